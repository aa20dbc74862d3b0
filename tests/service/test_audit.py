"""The audit log: no acknowledged line is lost, no line damages another, and no content is written unless asked for."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from guardreasoner_vl import __version__
from guardreasoner_vl.errors import GuardError
from guardreasoner_vl.images.decode import checked_images
from guardreasoner_vl.service import audit
from guardreasoner_vl.service.audit import AuditLog, AuditSettings
from guardreasoner_vl.service.callers import Origin
from guardreasoner_vl.types import Exchange, Judgement, Label, ModelInfo, Turn, Usage, Verdict, VerdictError, unix_lines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guardreasoner_vl.types import ImageSource

CANARY = "canary-of-the-caller"
JUDGED = Verdict(
    request=Judgement(label=Label.HARMFUL, score=0.75),
    response=Judgement(label=Label.NOT_APPLICABLE),
    flagged=True,
    action="block",
    reasoning=f"the user wrote {CANARY}",
    mode="slow",
    model=ModelInfo(name="tiny", revision="abc"),
    usage=Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=5, seconds=0.5),
)
UNJUDGED = JUDGED.model_copy(
    update={
        "request": Judgement(label=Label.ERROR),
        "flagged": None,
        "error": VerdictError(code="engine", message=f"it failed on {CANARY}"),
    }
)
ASKED = Exchange(f"What is {CANARY}?", (b"image " + CANARY.encode(),), f"It is {CANARY}.", (Turn(CANARY, (), CANARY),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def put(log: AuditLog, number: object = 0, verdict: Verdict = JUDGED, exchange: Exchange | None = ASKED) -> None:
    log.record(verdict, digest="d" * 64, origin=Origin(f"r{number}"), target="request", exchange=exchange)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def in_order(path: Path) -> list[Path]:
    """The files of a rotated log, the oldest first."""
    older = [one for one in path.parent.iterdir() if one.name.startswith(f"{path.name}.")]
    return [*sorted(older, key=lambda one: -int(one.suffix[1:])), *([path] if path.exists() else [])]


def numbers(path: Path) -> list[int]:
    return [int(row["request_id"][1:]) for file in in_order(path) for row in rows(file)]


# What a line says


def test_a_line_names_all_but_the_content(path: Path) -> None:
    log = AuditLog(AuditSettings(path=path))
    log.record(JUDGED, digest="abc", origin=Origin("r1"), target="response", exchange=ASKED, cached=True)
    (row,) = rows(path)
    assert datetime.fromisoformat(row.pop("time")).utcoffset() == timedelta(0)
    assert row == {
        "request_id": "r1",
        "traceparent": None,
        "caller": "anonymous",
        "digest": "abc",
        "target": "response",
        "cached": True,
        "request": {"label": "harmful", "score": 0.75},
        "response": {"label": "not_applicable", "score": None},
        "flagged": True,
        "action": "block",
        "mode": "slow",
        "model": {"name": "tiny", "revision": "abc"},
        "usage": {"prompt_tokens": 9, "cached_tokens": 4, "completion_tokens": 5, "seconds": 0.5},
        "error": None,
        "version": __version__,
        "prompt_version": audit.PROMPT_VERSION,
    }


def test_no_content_without_opt_in(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(AuditSettings(path=path))
    put(log)
    put(log, verdict=UNJUDGED)
    assert rows(path)[1]["error"] == "engine"
    assert CANARY not in path.read_text() + caplog.text


def test_content_is_written_where_asked_for(path: Path) -> None:
    log = AuditLog(AuditSettings(path=path, content=True))
    put(log)
    put(log, verdict=UNJUDGED, exchange=None)
    first, second = rows(path)
    assert first["reasoning"] == JUDGED.reasoning
    assert first["exchange"] == {
        "prompt": ASKED.prompt,
        "response": ASKED.response,
        "images": [hashlib.sha256(b"image " + CANARY.encode()).hexdigest()],
        "history": [{"prompt": CANARY, "response": CANARY, "images": []}],
    }
    assert first["response"] == JUDGED.response.model_dump(mode="json")
    assert second["exchange"] is None
    assert UNJUDGED.error
    assert UNJUDGED.error.message not in path.read_text()


def test_images_are_named_by_their_bytes(path: Path) -> None:
    encoded = base64.b64encode(b"bytes").decode()
    odd = ["data:image/png,%89PNG", "data:image/png;base64,%89", "data:;base64,\u00e4", "data:"]
    (checked,) = checked_images(Image.new("RGB", (4, 4)))
    images: list[ImageSource] = [
        b"bytes",
        f"data:image/png;base64,{encoded}",
        checked,
        path,
        Image.new("RGB", (4, 4)),
        *odd,
    ]
    log = AuditLog(AuditSettings(path=path, content=True))
    put(log, exchange=Exchange(images=tuple(images)))
    (row,) = rows(path)
    same = hashlib.sha256(b"bytes").hexdigest()
    texts = [hashlib.sha256(text.encode()).hexdigest() for text in odd]
    assert row["exchange"]["images"] == [same, same, checked.digest, None, None, *texts]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(min_size=1))
def test_nothing_in_the_content_ends_a_line(
    tmp_path_factory: pytest.TempPathFactory, text: str, request_id: str
) -> None:
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    hostile = f"{text}\r\n\x0b\x0c\x1c\x85\u2028\u2029\x00{{}}"
    log = AuditLog(AuditSettings(path=path, content=True))
    log.record(JUDGED, digest="d", origin=Origin(request_id), target="request", exchange=Exchange(hostile))
    log.close()
    (line,) = path.read_text("utf-8").splitlines()
    assert json.loads(line)["exchange"]["prompt"] == unix_lines(hostile)
    assert json.loads(line)["request_id"] == request_id


def test_off_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = AuditLog(AuditSettings())
    put(log)
    log.close()
    assert not list(tmp_path.iterdir())
    assert log.failed == 0


@pytest.mark.parametrize("impossible", [{"keep": 0}, {"max_bytes": 0}, {"fsync": True}])
def test_impossible_settings_are_refused(impossible: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AuditSettings(**impossible)


# What survives

CHILD = """
import sys
from pathlib import Path
from guardreasoner_vl.service.callers import Origin
from guardreasoner_vl.service.audit import AuditLog, AuditSettings
from guardreasoner_vl.types import Verdict
path, verdict, number = Path(sys.argv[1]), Verdict.model_validate_json(sys.argv[2]), int(sys.argv[3])
log = AuditLog(AuditSettings(path=path, max_bytes=4000, keep=100_000))
while True:
    log.record(verdict, digest="d", origin=Origin(f"r{number}"), target="request", exchange=None)
    print(number, flush=True)
    number += 1
"""


@pytest.mark.slow
def test_kill_9_leaves_whole_lines_and_loses_none(path: Path) -> None:
    """Files are smaller than a page, so that the kernel does not tear a write and most kills come near a rotation."""
    first = 0
    for lines in (60, 130):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path), JUDGED.model_dump_json(), str(first)], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout
            acknowledged = [int(child.stdout.readline()) for _ in range(lines)]
            child.send_signal(signal.SIGKILL)
            acknowledged += [int(line) for line in child.stdout if line.endswith(b"\n")]
        numbers_found = numbers(path)
        assert all(file.read_bytes().endswith(b"\n") for file in in_order(path) if file.stat().st_size)
        assert numbers_found == list(range(len(numbers_found)))
        assert acknowledged[-1] < len(numbers_found) <= acknowledged[-1] + 2
        first = len(numbers_found)
    assert len(in_order(path)) > 20


def test_a_line_is_one_write_at_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    written: list[bytes] = []
    real_open, real = os.open, os.write

    def open_(file: Path, flags: int, mode: int) -> int:
        opened.append(flags)
        return real_open(file, flags, mode)

    def write(file: int, data: bytes) -> int:
        written.append(data)
        return real(file, data)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "write", write)
    log = AuditLog(AuditSettings(path=path, content=True))
    put(log, exchange=Exchange("long " * 100_000))
    put(log)
    monkeypatch.undo()
    assert [flags & os.O_APPEND for flags in opened] == [os.O_APPEND]
    assert len(written) == 2
    assert b"".join(written) == path.read_bytes()
    assert all(data.endswith(b"\n") for data in written)


@pytest.mark.parametrize("torn", [b'{"time": "20', b"\0\0\0\0", b'{"whole": 1}'])
def test_a_torn_line_is_closed_off_at_the_next_start(path: Path, torn: bytes) -> None:
    path.write_bytes(b'{"whole": 0}\n' + torn)
    log = AuditLog(AuditSettings(path=path))
    assert path.read_bytes() == b'{"whole": 0}\n' + torn + b"\n"
    put(log)
    log.close()
    AuditLog(AuditSettings(path=path)).close()
    assert json.loads(path.read_bytes().split(b"\n")[2])["request_id"] == "r0"
    assert path.read_bytes().count(b"\n") == 3


def test_sync_waits_for_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    log = AuditLog(AuditSettings(path=path, sync=True))
    assert synced == [path.parent.stat().st_ino]
    put(log)
    assert synced[1:] == [path.stat().st_ino]
    put(AuditLog(AuditSettings(path=path.with_name("other"))))
    assert len(synced) == 2


# Rotation


def one_line(path: Path) -> int:
    log = AuditLog(AuditSettings(path=path.with_name("measure")))
    put(log)
    return path.with_name("measure").stat().st_size


def test_rotation_keeps_order_and_limits(path: Path) -> None:
    limit = 3 * one_line(path) + 10
    log = AuditLog(AuditSettings(path=path, max_bytes=limit, keep=2))
    for number in range(10):
        put(log, number)
    files = in_order(path)
    assert [file.name for file in files] == ["audit.jsonl.2", "audit.jsonl.1", "audit.jsonl"]
    assert [[row["request_id"] for row in rows(file)] for file in files] == [
        ["r3", "r4", "r5"],
        ["r6", "r7", "r8"],
        ["r9"],
    ]
    assert all(file.stat().st_size <= limit for file in files)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_line_above_the_limit_has_a_file_of_its_own(path: Path) -> None:
    log = AuditLog(AuditSettings(path=path, max_bytes=1))
    for number in range(3):
        put(log, number)
    assert [len(rows(file)) for file in in_order(path)] == [1, 1, 1]
    assert numbers(path) == [0, 1, 2]


def test_rotation_fills_the_gap_that_a_kill_left(path: Path) -> None:
    for number, name in ((0, "audit.jsonl.3"), (1, "audit.jsonl.1"), (2, "audit.jsonl")):
        path.with_name(name).write_text(f'{{"request_id": "r{number}"}}\n')
    put(AuditLog(AuditSettings(path=path, max_bytes=1, keep=3)), 3)
    assert numbers(path) == [0, 1, 2, 3]
    assert len(in_order(path)) == 4


def test_a_smaller_keep_drops_what_was_kept_before(path: Path) -> None:
    log = AuditLog(AuditSettings(path=path, max_bytes=1, keep=5))
    for number in range(6):
        put(log, number)
    log.close()
    put(AuditLog(AuditSettings(path=path, max_bytes=1, keep=2)), 6)
    assert numbers(path) == [4, 5, 6]


def test_threads_lose_and_mix_nothing(path: Path) -> None:
    log = AuditLog(AuditSettings(path=path, max_bytes=5000, keep=1000))

    def work(base: int) -> None:
        for number in range(base, base + 50):
            put(log, number)

    threads = [threading.Thread(target=work, args=(base,)) for base in range(0, 400, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers(path)) == list(range(400))
    assert log.failed == 0


def test_a_file_that_others_moved_or_deleted_is_made_again(path: Path) -> None:
    log = AuditLog(AuditSettings(path=path))
    put(log, 0)
    path.rename(path.with_name("taken"))
    put(log, 1)
    path.unlink()
    put(log, 2)
    assert [row["request_id"] for row in rows(path.with_name("taken")) + rows(path)] == ["r0", "r2"]


# Faults


def test_only_the_owner_may_read(path: Path) -> None:
    old = os.umask(0)
    try:
        AuditLog(AuditSettings(path=path))
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["no folder", "folder", "file as folder", "pipe", "nul"])
def test_a_path_that_cannot_be_written_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    path = {
        "no folder": tmp_path / "missing" / "audit.jsonl",
        "folder": tmp_path,
        "file as folder": tmp_path / "file" / "audit.jsonl",
        "pipe": tmp_path / "pipe",
        "nul": tmp_path / "a\0b",
    }[kind]
    with pytest.raises(GuardError, match=r"the audit log cannot be opened \(.+\); give a file") as caught:
        AuditLog(AuditSettings(path=path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_forbids_rotation_is_refused_at_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda folder, mode: (folder, mode) != (path.parent, os.W_OK))
    with pytest.raises(GuardError, match="could not be rotated"):
        AuditLog(AuditSettings(path=path))


def test_one_log_at_a_time_has_the_file(path: Path) -> None:
    log = AuditLog(AuditSettings(path=path))
    with pytest.raises(GuardError, match="another process writes to it"):
        AuditLog(AuditSettings(path=path))
    log.close()
    AuditLog(AuditSettings(path=path)).close()


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """Limit the size of this process's files: a longer write is cut short, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_loud_counted_and_not_raised(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failures: list[int] = []
    log = AuditLog(AuditSettings(path=path, content=True), on_failure=lambda: failures.append(1))
    put(log, 0)
    whole = path.stat().st_size
    with disk_full_after(whole + 30):
        put(log, 1)
        put(log, 2)
    put(log, 3)
    assert log.failed == len(failures) == 2
    lost = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert [getattr(record, "request_id", None) for record in lost] == ["r1", "r2"]
    assert "free disk space" in lost[0].getMessage()
    assert CANARY not in caplog.text
    first, torn, last, rest = path.read_bytes().split(b"\n")
    assert json.loads(first)["request_id"] == "r0"
    assert len(torn) == 30
    assert json.loads(last)["request_id"] == "r3"
    assert rest == b""


@pytest.mark.parametrize("step", ["os.open", "pathlib.Path.replace"])
def test_rotation_that_fails_keeps_the_lines(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    log = AuditLog(AuditSettings(path=path, max_bytes=1, keep=3))
    put(log, 0)

    def refused(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(step, refused)
    put(log, 1)
    monkeypatch.undo()
    put(log, 2)
    assert "cannot be rotated (Too many open files)" in caplog.text
    assert numbers(path) == [0, 1, 2]
    assert log.failed == 0


def test_a_number_that_is_none_is_a_counted_failure(path: Path) -> None:
    log = AuditLog(AuditSettings(path=path))
    put(log, verdict=JUDGED.model_copy(update={"usage": Usage(seconds=float("nan"))}))
    put(log, 1)
    assert log.failed == 1
    assert [row["request_id"] for row in rows(path)] == ["r1"]
