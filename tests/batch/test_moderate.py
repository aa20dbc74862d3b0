"""Batch moderation: every line of IN is accounted for, and no interruption loses or duplicates a verdict."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from guardreasoner_vl.batch import output as batch_output
from guardreasoner_vl.batch.moderate import check_paths, rejected_path, run_batch, settings_path
from guardreasoner_vl.batch.output import open_output, saved_line, verdict_json
from guardreasoner_vl.batch.rows import BatchRow, RejectedLine, read_batch_rows
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.storage import jsonl_log
from guardreasoner_vl.types import Verdict
from tests.scripted_guard import scripted_guard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.guard import Guard

ROOT = Path(__file__).parents[2]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def numbered(path: Path, count: int) -> Path:
    return write_rows(path, [{"id": n, "prompt": f"number {n}"} for n in range(count)])


def saved(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def ids(path: Path) -> list[Any]:
    return [row["id"] for row in saved(path)]


def digest_of(item: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(item).encode()).hexdigest()[:16]


def asked(guard: Guard) -> int:
    return len(guard.engine.requests)  # type: ignore[attr-defined]


def rows_of(text: bytes, folder: Path = Path("/in")) -> list[BatchRow | RejectedLine]:
    return list(read_batch_rows(text.splitlines(keepends=True), folder))


# Reading


def test_rows_hold_what_is_judged_and_name_what_is_not() -> None:
    text = b'\xef\xbb\xbf{"id": "a", "prompt": "p", "images": null, "source": "x"}\r\n\n  \n{"id": 2, "messages": []}'
    first, second = rows_of(text)
    assert first == BatchRow(1, "a", {"prompt": "p"}, digest_of({"prompt": "p"}), ("source",))
    assert second == BatchRow(4, 2, {}, digest_of({}))


def test_image_paths_start_at_the_folder_of_the_file() -> None:
    images = ["a.png", "/abs/b.png", "data:image/png;base64,AA", "https://example.org/c.png", 7]
    (row,) = rows_of(json.dumps({"id": 1, "images": images}).encode())
    assert isinstance(row, BatchRow)
    assert row.item["images"] == [Path("/in/a.png"), Path("/abs/b.png"), images[2], images[3], 7]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"nonsense", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"id": 1, "prompt": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"prompt": "p"}', "no id"),
        (b'{"id": null, "prompt": "p"}', "no id"),
        (b'{"id": true, "prompt": "p"}', "no id"),
        (b'{"id": 1.5, "prompt": "p"}', "no id"),
        (b'{"id": "", "prompt": "p"}', "no id"),
        (b'{"id": [1], "prompt": "p"}', "no id"),
        (b'{"id": "\\ud800", "prompt": "p"}', "not valid Unicode"),
        (b'{"id": 1, "prompt": "kind", "prompt": "unkind"}', "has a key twice"),
        (b'{"id": 1, "prompt": "p", "image": ["a.png"]}', "did you mean 'images'"),
        (b'{"id": 1, "prompt": "p", "Response": "r"}', "did you mean 'response'"),
    ],
)
def test_lines_that_are_no_rows_are_rejected_with_the_reason(line: bytes, reason: str) -> None:
    before, rejected, after = rows_of(b'{"id": "x", "prompt": "p"}\n' + line + b'\n{"id": "y", "prompt": "p"}\n')
    assert isinstance(before, BatchRow)
    assert isinstance(after, BatchRow)
    assert isinstance(rejected, RejectedLine)
    assert rejected.line == 2
    assert reason in rejected.reason


def test_a_second_row_with_the_same_id_is_rejected_and_an_integer_is_not_its_string() -> None:
    first, other, second = rows_of(b'{"id": 1, "prompt": "p"}\n{"id": "1", "prompt": "p"}\n{"id": 1, "prompt": "q"}\n')
    assert isinstance(first, BatchRow)
    assert isinstance(other, BatchRow)
    assert second == RejectedLine(3, "line 1 has the same id: give each row its own id")


def test_a_line_that_is_too_long_is_rejected_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guardreasoner_vl.batch.rows.MAX_LINE", 60)
    monkeypatch.setattr(jsonl_log, "MAX_LINE", 60)
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"id": 1, "prompt": "p"}' + b" " * 200 + b'{"id": 2}\n{"id": 3, "prompt": "p"}\n')
    summary = run_batch(scripted_guard(), source, tmp_path / "out.jsonl")
    assert [rejected.line for rejected in summary.rejected] == [1]
    assert ids(tmp_path / "out.jsonl") == [3]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_ROWLIKE = st.dictionaries(st.sampled_from(["id", "prompt", "images", "response", "messages", "x"]), _JSON)
_LINE = (
    st.binary(max_size=40)
    | _JSON.map(lambda value: json.dumps(value).encode())
    | _ROWLIKE.map(lambda value: json.dumps(value).encode())
)


@pytest.mark.slow
@given(st.lists(_LINE, max_size=12))
@example([b'{"id": "\\udfff"}', b"\x00", b"\xef\xbb\xbf"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_lines_never_crash_and_every_one_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    text = b"\n".join(lines)
    (folder / "in.jsonl").write_bytes(text)
    counted = [line for line in text.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    summary = run_batch(scripted_guard(), folder / "in.jsonl", folder / "out.jsonl", chunk=4)
    assert summary.judged + len(summary.rejected) == len(counted)
    out = folder / "out.jsonl"
    written = saved(out) if out.exists() else []
    assert len({(type(row["id"]), row["id"]) for row in written}) == len(written) == summary.judged
    for row in written:
        Verdict.model_validate({name: value for name, value in row.items() if name not in ("id", "input")})


# Judging


def test_each_row_gets_one_verdict_in_order(tmp_path: Path) -> None:
    Image.new("RGB", (60, 60), "red").save(tmp_path / "red.png")
    rows: list[dict[str, Any]] = [
        {"id": "kind", "prompt": "hello"},
        {"id": "unkind", "prompt": "BAD", "response": "BAD"},
        {"id": "image", "images": ["red.png"]},
        {"id": "chat", "messages": [{"role": "user", "content": "BAD"}]},
        {"id": "empty", "prompt": "  "},
        {"id": "lost", "images": ["lost.png"]},
        {"id": "both", "prompt": "p", "messages": [{"role": "user", "content": "q"}]},
        {"id": "typed", "prompt": 5},
        {"id": "broken", "prompt": "BROKEN"},
    ]
    guard = scripted_guard()
    progress_calls: list[tuple[int, int]] = []
    out = tmp_path / "out.jsonl"
    summary = run_batch(
        guard,
        write_rows(tmp_path / "in.jsonl", rows),
        out,
        chunk=4,
        progress=lambda *numbers: progress_calls.append(numbers),
    )
    assert ids(out) == [row["id"] for row in rows]
    verdicts = {row["id"]: row for row in saved(out)}
    assert [verdicts[name]["action"] for name in ("kind", "unkind", "image", "chat")] == [
        "allow",
        "block",
        "allow",
        "block",
    ]
    assert {row["id"]: row["error"]["code"] for row in saved(out) if row["error"]} == {
        "empty": "invalid_input",
        "lost": "invalid_image",
        "both": "invalid_input",
        "typed": "invalid_input",
        "broken": "engine",
    }
    assert summary.tally.actions == {"allow": 2, "block": 7}
    assert summary.tally.requests == {"unharmful": 2, "harmful": 2, "error": 5}
    assert summary.tally.errors == {"invalid_input": 3, "invalid_image": 1, "engine": 1}
    assert summary.usage.prompt_tokens == sum(row["usage"]["prompt_tokens"] for row in saved(out)) > 0
    assert progress_calls == [(4, 9), (8, 9), (9, 9)]
    assert summary.per_second > 0
    assert not summary.complete


def test_reasoning_is_written_only_if_asked_for(tmp_path: Path) -> None:
    source = numbered(tmp_path / "in.jsonl", 1)
    run_batch(scripted_guard(), source, tmp_path / "without.jsonl")
    run_batch(scripted_guard(), source, tmp_path / "with.jsonl", show_reasoning=True)
    assert [saved(tmp_path / name)[0]["reasoning"] for name in ("without.jsonl", "with.jsonl")] == [
        None,
        "Looked at it.",
    ]


def test_a_line_is_ascii_without_line_ends_or_lone_surrogates() -> None:
    verdict = next(scripted_guard(reasoning="a\u2028b\x9b \U0001f600").moderate_batch([{"prompt": "p"}]))
    odd = verdict.model_copy(update={"reasoning": "x\ud800\x1b[2J\u2028"})
    for content in (saved_line("ä\n\u2028", "", verdict, True), saved_line(1, "0", odd, True)):
        assert content.isascii()
        assert content.count(b"\n") == 1
        assert b"\x1b" not in content
        batch_output.SavedRow.model_validate_json(content)
    assert json.loads(verdict_json(odd, True))["reasoning"] == "x?\x1b[2J\u2028"
    assert json.loads(verdict_json(verdict, True))["reasoning"] == verdict.reasoning


def test_a_chunk_is_on_disk_before_the_next_one_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    guard = scripted_guard()
    events: list[Any] = []
    generate, fsync = guard.engine.generate, os.fsync

    def judged(requests: Any) -> Any:
        events.append("judge")
        return generate(requests)

    def recorded(descriptor: int) -> None:
        fsync(descriptor)
        if lines := out.read_bytes().count(b"\n"):
            events.append(lines)

    monkeypatch.setattr(guard.engine, "generate", judged)
    monkeypatch.setattr(os, "fsync", recorded)
    run_batch(guard, numbered(tmp_path / "in.jsonl", 5), out, chunk=2)
    assert events == ["judge", 2, "judge", 4, "judge", 5]


# Going on


def test_a_finished_batch_is_not_judged_again(tmp_path: Path) -> None:
    source, out = numbered(tmp_path / "in.jsonl", 6), tmp_path / "out.jsonl"
    first = run_batch(scripted_guard(), source, out)
    content = out.read_bytes()
    again = scripted_guard()
    summary = run_batch(again, source, out)
    assert (first.judged, first.resumed, summary.judged, summary.resumed) == (6, 0, 0, 6)
    assert asked(again) == 0
    assert out.read_bytes() == content
    assert summary.tally == first.tally
    assert summary.complete


def test_a_row_that_changed_is_judged_again(tmp_path: Path) -> None:
    source, out = numbered(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    run_batch(scripted_guard(), source, out)
    rows = [{"id": n, "prompt": "other" if n == 1 else f"number {n}", "note": "new"} for n in range(3)]
    write_rows(source, rows)
    again = scripted_guard()
    summary = run_batch(again, source, out)
    assert (summary.judged, summary.resumed, asked(again)) == (1, 2, 1)
    assert ids(out) == [0, 2, 1]
    assert saved(out)[-1]["input"] == digest_of({"prompt": "other"})


def test_verdicts_without_digests_are_resumed(tmp_path: Path) -> None:
    source, out = numbered(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    run_batch(scripted_guard(), source, out)
    out.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "input"}) + "\n" for row in saved(out)))
    assert run_batch(scripted_guard(), source, out).resumed == 3


def test_ids_of_every_kind_are_recognised(tmp_path: Path) -> None:
    names = [0, -7, 10**40, "0", "ä\u2028\n", 'quo"te', "\U0001f600", "  ", "\x1b[2J"]
    source = write_rows(tmp_path / "in.jsonl", [{"id": name, "prompt": "p"} for name in names])
    out = tmp_path / "out.jsonl"
    run_batch(scripted_guard(), source, out)
    assert ids(out) == names
    assert run_batch(scripted_guard(), source, out).resumed == len(names)


def test_verdicts_of_other_settings_are_refused(tmp_path: Path) -> None:
    source, out = numbered(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    run_batch(scripted_guard(), source, out)
    content = out.read_bytes()
    numbered(source, 5)
    strict = scripted_guard(Policy(thresholds=(0.1, 0.1)))
    with pytest.raises(DataError, match=r"out\.jsonl holds verdicts with other inputs \(changed: thresholds\); "):
        run_batch(strict, source, out)
    assert out.read_bytes() == content
    out.unlink()
    assert run_batch(strict, source, out).judged == 5


def test_verdicts_without_settings_beside_them_are_resumed(tmp_path: Path) -> None:
    source, out = numbered(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    run_batch(scripted_guard(), source, out)
    settings_path(out).unlink()
    assert run_batch(scripted_guard(), source, out).resumed == 3
    assert settings_path(out).is_file()


@pytest.mark.parametrize("content", ["{}", "notes", '["thresholds"]'])
def test_a_file_of_somebody_else_is_not_overwritten_with_settings(content: str, tmp_path: Path) -> None:
    source, out = numbered(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    settings_path(out).write_text(content)
    with pytest.raises(DataError, match=r"out\.settings\.json exists and was not written by a batch"):
        run_batch(scripted_guard(), source, out)
    assert settings_path(out).read_text() == content
    assert not out.exists()


def test_rows_that_were_added_are_judged(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run_batch(scripted_guard(), numbered(tmp_path / "in.jsonl", 3), out)
    assert run_batch(scripted_guard(), numbered(tmp_path / "in.jsonl", 5), out).judged == 2
    assert ids(out) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_wherever_the_file_was_cut_off_every_row_is_there_once_afterwards(tmp_path: Path) -> None:
    source, out = numbered(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    run_batch(scripted_guard(), source, out)
    whole = out.read_bytes()
    for length in range(0, len(whole), 7):
        out.write_bytes(whole[:length])
        summary = run_batch(scripted_guard(), source, out)
        assert ids(out) == [0, 1, 2]
        assert summary.resumed >= whole[:length].count(b"\n")
        assert out.read_bytes().endswith(b"\n")


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path: Path) -> None:
    source, out = numbered(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    run_batch(scripted_guard(), source, out)
    out.write_bytes(out.read_bytes()[:-1])
    assert run_batch(scripted_guard(), source, out).resumed == 3
    assert ids(out) == [0, 1, 2]


def test_error_rows_are_judged_again(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, [{"id": n, "prompt": "BROKEN" if n % 2 else f"number {n}"} for n in range(5)])
    assert run_batch(scripted_guard(), source, out).tally.errors == {"engine": 2}
    out.chmod(0o640)
    numbered(source, 5)
    guard = scripted_guard()
    summary = run_batch(guard, source, out)
    assert (summary.judged, summary.resumed, summary.complete) == (2, 3, True)
    assert asked(guard) == 2
    assert ids(out) == [0, 2, 4, 1, 3]
    assert out.stat().st_mode & 0o777 == 0o640


def test_error_rows_of_another_file_stay(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run_batch(scripted_guard(), write_rows(tmp_path / "a.jsonl", [{"id": "a", "prompt": "BROKEN"}]), out)
    run_batch(scripted_guard(), write_rows(tmp_path / "b.jsonl", [{"id": "b", "prompt": "p"}]), out)
    assert ids(out) == ["a", "b"]


def test_a_stop_while_error_rows_are_taken_out_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, [{"id": 1, "prompt": "BROKEN"}, {"id": 2, "prompt": "p"}])
    run_batch(scripted_guard(), source, out)
    content = out.read_bytes()

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_batch(scripted_guard(), source, out)
    assert out.read_bytes() == content
    monkeypatch.undo()
    assert run_batch(scripted_guard(), source, out).judged == 1
    assert sorted(ids(out)) == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.settings.json"]


def test_an_interrupt_keeps_what_was_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = numbered(tmp_path / "in.jsonl", 6), tmp_path / "out.jsonl"
    guard = scripted_guard()
    generate, calls = guard.engine.generate, iter([False, False, True])

    def interrupted(requests: Any) -> Any:
        if next(calls):
            raise KeyboardInterrupt
        return generate(requests)

    monkeypatch.setattr(guard.engine, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_batch(guard, source, out, chunk=2)
    assert ids(out) == [0, 1, 2, 3]
    assert run_batch(scripted_guard(), source, out, chunk=2).resumed == 4
    assert ids(out) == list(range(6))


@pytest.mark.slow
def test_a_batch_killed_again_and_again_loses_and_doubles_nothing(tmp_path: Path) -> None:
    count = 120
    source, out = numbered(tmp_path / "in.jsonl", count), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "tests.slow_batch", str(source), str(out), "3"]
    before = 0
    for _ in range(3):
        child = subprocess.Popen(command, cwd=ROOT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and child.poll() is None:
            if out.exists() and out.read_bytes().count(b"\n") >= before + 12:
                break
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        now = out.read_bytes().count(b"\n")
        assert before < now < count
        before = now
    summary = run_batch(scripted_guard(), source, out)
    assert (summary.judged, summary.resumed) == (count - before, before)
    assert ids(out) == list(range(count))


# Refusals


@pytest.mark.parametrize(
    "content",
    [
        b"my notes\n",
        b"my notes",
        b'{"id": 1, "prompt": "somebody\'s data"}',
        b'{"id": 1, "prompt": "somebody\'s data"}\n',
        b"\n",
        b"\x00\x00\x00",
        b"[]",
        b'{"id": true}\n',
    ],
)
def test_a_file_that_is_no_batch_output_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(DataError, match=r"line 1: not a batch's verdict; left as it is, name another OUT"):
        run_batch(scripted_guard(), numbered(tmp_path / "in.jsonl", 1), out)
    assert out.read_bytes() == content


def test_a_broken_line_in_the_middle_is_somebodys_to_look_at(tmp_path: Path) -> None:
    source, out = numbered(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    run_batch(scripted_guard(), source, out)
    lines = out.read_bytes().splitlines(keepends=True)
    broken = b"".join([lines[0], lines[1][:30] + b"\n", lines[2]])
    out.write_bytes(broken)
    with pytest.raises(DataError, match="line 2: not a batch's verdict"):
        run_batch(scripted_guard(), source, out)
    assert out.read_bytes() == broken


def test_in_and_out_must_be_two_files_that_can_be_used(tmp_path: Path) -> None:
    source = numbered(tmp_path / "in.jsonl", 1)
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "folder").mkdir()
    circle = tmp_path / "circle.jsonl"
    circle.symlink_to(circle)
    content = source.read_bytes()
    for bad_in, bad_out, words in [
        (source, source, "must be different files"),
        (source, tmp_path / "link.jsonl", "must be different files"),
        (numbered(tmp_path / "o.rejected.jsonl", 1), tmp_path / "o.jsonl", "must be different files"),
        (tmp_path / "none.jsonl", tmp_path / "out.jsonl", "no such file"),
        (tmp_path / "folder", tmp_path / "out.jsonl", "not a regular file"),
        (source, tmp_path / "folder", "not a regular file"),
        (source, Path("/dev/null"), "not a regular file"),
        (circle, tmp_path / "out.jsonl", "no such file"),
        (source, circle, "cannot be written"),
        (source, tmp_path / "none" / "out.jsonl", "its folder does not exist"),
    ]:
        with pytest.raises(DataError, match=words):
            run_batch(scripted_guard(), bad_in, bad_out)
    assert source.read_bytes() == content
    assert not (tmp_path / "out.jsonl").exists()


def test_no_file_is_made_where_nothing_can_be_judged(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"")
    assert run_batch(scripted_guard(), source, out).complete
    source.write_bytes(b"nonsense\n")
    assert len(run_batch(scripted_guard(), source, out).rejected) == 1
    assert not out.exists()


def test_a_linked_output_stays_a_link(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"id": 1, "prompt": "BROKEN"}])
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "real.jsonl")
    for _ in range(2):
        run_batch(scripted_guard(), source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").is_symlink()
    assert ids(tmp_path / "real.jsonl") == [1]


def test_one_run_at_a_time_has_the_file(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, [{"id": 1, "prompt": "BROKEN"}, {"id": 2, "prompt": "p"}])
    digests: dict[Any, str] = {1: digest_of({"prompt": "BROKEN"}), 2: digest_of({"prompt": "p"})}
    for _ in range(2):  # the second time, the file is rewritten without its error row
        with open_output(out, digests, lambda row: None), pytest.raises(DataError, match="another batch is writing"):
            run_batch(scripted_guard(), source, out)
        run_batch(scripted_guard(), source, out)
    assert sorted(ids(out)) == [1, 2]


def test_verdicts_of_two_guards_do_not_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = numbered(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    run_batch(scripted_guard(), source, out)
    content = out.read_bytes()
    with pytest.raises(DataError, match="in mode slow, this run is scripted in mode fast"):
        run_batch(scripted_guard(Policy(mode="fast")), source, out)
    other = saved(out)[0] | {"model": {"name": "another", "revision": "abc"}}
    out.write_text(json.dumps(other) + "\n")
    with pytest.raises(DataError, match=r"verdicts of another \(abc\)"):
        run_batch(scripted_guard(), source, out)
    out.write_bytes(content)
    assert run_batch(scripted_guard(), source, out).resumed == 1


# Rejected lines


def test_rejected_lines_are_listed_without_their_content_until_they_are_mended(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'{"id": 1, "prompt": "p"}\nSECRET\n{"prompt": "SECRET"}\n')
    summary = run_batch(scripted_guard(), source, out)
    listed = tmp_path / "out.rejected.jsonl"
    assert [(row["line"], row["reason"]) for row in saved(listed)] == [(r.line, r.reason) for r in summary.rejected]
    assert [row["line"] for row in saved(listed)] == [2, 3]
    assert "SECRET" not in listed.read_text()
    assert not summary.complete
    numbered(source, 3)
    assert run_batch(scripted_guard(), source, out).complete
    assert not listed.exists()


def test_a_file_in_the_place_of_the_list_is_not_overwritten(tmp_path: Path) -> None:
    source = numbered(tmp_path / "in.jsonl", 1)
    listed = rejected_path(tmp_path / "out.jsonl")
    for content in ("my notes", "", "[]"):
        listed.write_text(content)
        with pytest.raises(DataError, match="was not written by a batch"):
            check_paths(source, tmp_path / "out.jsonl")
        assert listed.read_text() == content
    assert rejected_path(Path("a/verdicts")) == Path("a/verdicts.rejected.jsonl")
