"""Synthesis by batch files: the same rows, gates and attempts as online; every line that comes back is counted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.corpus.attempts import REASONING, AttemptIndex
from guardreasoner_vl.corpus.batch_synthesis import read_results, write_batch_requests
from guardreasoner_vl.corpus.store import CorpusInfo, read_corpus, write_corpus
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.stages.synthesize import run
from guardreasoner_vl.teachers.budget import Price
from guardreasoner_vl.teachers.offline import RulesTeacher
from guardreasoner_vl.teachers.openai import DEFAULT_MODEL, Chat
from guardreasoner_vl.types import Sample
from tests.teachers.teacher_server import STEPS, Reply, answer, completion, system_of, truthful

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from guardreasoner_vl.corpus.batch_synthesis import ReadResults


def row(name: str, **fields: Any) -> Sample:
    content = {"prompt": f"bread [{name}]", "request_label": "unharmful", "modality": "text", "source": "toy", **fields}
    return Sample.model_validate({"id": name, **content})


def corpus(folder: Path, *rows: Sample) -> Path:
    write_corpus(folder, CorpusInfo(name="toy"), rows)
    return folder


def requests(folder: Path) -> list[dict[str, Any]]:
    written = write_batch_requests(folder, folder / "ask.jsonl", Chat())
    lines = [json.loads(line) for path in written.files for line in path.read_bytes().splitlines()]
    assert len(lines) == written.requests
    return lines


def result(custom_id: str, reply: Reply, status: int = 200) -> dict[str, Any]:
    return {"custom_id": custom_id, "response": {"status_code": status, "body": completion(reply)}, "error": None}


def read(folder: Path, *results: dict[str, Any] | str) -> ReadResults:
    path = folder / "answers.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in results))
    return read_results(folder, [path], DEFAULT_MODEL)


def answered(asked: list[dict[str, Any]], brain: Callable[[dict[str, Any]], Reply] = truthful) -> list[dict[str, Any]]:
    """What the API makes of the requests, in another order."""
    return [result(one["custom_id"], brain(one["body"])) for one in reversed(asked)]


def counts(returned: ReadResults) -> tuple[int, int, int, int]:
    stands = returned.progress
    return stands.rows, stands.kept, stands.skipped.total, stands.remaining


def test_one_request_for_every_row_that_needs_one_and_its_answer(tmp_path: Path) -> None:
    folder = corpus(tmp_path, row("a"), row("own", reasoning="mine"), row("b", request_label="harmful"))
    asked = requests(folder)
    assert [one["custom_id"] for one in asked] == ["reasoning-1/a", "reasoning-1/b"]
    body = asked[0]["body"]
    assert {**body, "messages": 0} == {
        "model": DEFAULT_MODEL,
        "temperature": 1.0,
        "max_tokens": 1536,
        "messages": 0,
    }
    assert "Request: unharmful" in system_of(body)
    returned = read(folder, *answered(asked))
    assert (returned.answers, returned.ignored.total) == (2, 0)
    assert counts(returned) == (3, 3, 0, 0)
    assert [sample.reasoning for sample in read_corpus(folder)] == [STEPS, "mine", STEPS]
    # 100 tokens in, 20 out at half of 2.50 and 10.00 a million.
    assert AttemptIndex.read(folder / REASONING).cost == pytest.approx(2 * (100 * 1.25 + 20 * 5) / 1e6)
    assert requests(folder) == []


def test_a_price_is_halved(tmp_path: Path) -> None:
    folder = corpus(tmp_path, row("a"))
    (folder / "answers.jsonl").write_text(json.dumps(answered(requests(folder))[0]))
    read_results(folder, [folder / "answers.jsonl"], "odd", price=Price(1_000, 2_000))
    assert AttemptIndex.read(folder / REASONING).cost == pytest.approx(0.07)


def test_rejected_answers_are_asked_for_again_then_skipped(tmp_path: Path) -> None:
    folder = corpus(tmp_path, row("a"), row("b"))

    def brain(body: dict[str, Any]) -> Reply:
        return Reply("") if "[b]" in body["messages"][1]["content"] else truthful(body)

    assert counts(read(folder, *answered(requests(folder), brain))) == (2, 1, 0, 1)
    for number in (2, 3):
        (asked,) = requests(folder)
        assert asked["custom_id"] == f"reasoning-{number}/b"
        assert "not accepted: it was empty." in system_of(asked["body"])
        returned = read(folder, *answered([asked], brain))
    assert counts(returned) == (2, 1, 1, 0)
    assert returned.progress.skipped.rows == [("b", "empty")]
    assert requests(folder) == []


def test_wrong_answers_are_counted_and_never_lost(tmp_path: Path) -> None:
    folder = corpus(tmp_path, *(row(name) for name in "abcdef"), row("own", reasoning="mine"))
    good = {one["custom_id"]: one for one in answered(requests(folder))}
    returned = read(
        folder,
        good["reasoning-1/a"],
        good["reasoning-1/a"],
        result("reasoning-1/b", Reply(), status=500),
        {"custom_id": "reasoning-1/c", "response": None, "error": {"code": "batch_expired", "message": "cake"}},
        {"custom_id": "reasoning-1/d", "response": {"status_code": 200, "body": {}}, "error": None},
        result("reasoning-1/e", Reply("I'm sorry, I can't help.")),
        {**good["reasoning-1/a"], "custom_id": "reasoning-1/z"},
        {**good["reasoning-1/a"], "custom_id": "reasoning-1/own"},
        {**good["reasoning-1/a"], "custom_id": "label-1/f"},
        {**good["reasoning-1/a"], "custom_id": "cake"},
        "",
        "{torn",
    )
    assert returned.ignored.reasons == {"repeated custom_id": 1, "unknown custom_id": 4, "not a result": 1}
    assert returned.answers == 2
    assert counts(returned) == (7, 2, 0, 5)
    assert returned.progress.faults.reasons == {
        "teacher: http 500": 1,
        "teacher: batch_expired": 1,
        "teacher: malformed": 1,
    }
    # What has no answer is asked for again under the same name, and the answer is taken then.
    asked = requests(folder)
    assert [one["custom_id"] for one in asked] == [
        *(f"reasoning-1/{name}" for name in "bcd"),
        "reasoning-2/e",
        "reasoning-1/f",
    ]
    assert counts(read(folder, *answered(asked))) == (7, 7, 0, 0)


def test_reading_the_same_file_twice_changes_nothing(tmp_path: Path) -> None:
    folder = corpus(tmp_path, row("a"), row("b"))
    results = [result("reasoning-1/a", Reply("")), *answered(requests(folder))[:1]]
    first = read(folder, *results)
    before = (folder / REASONING).read_bytes()
    again = read(folder, *results)
    assert (again.answers, again.ignored.reasons) == (0, {"repeated custom_id": 2})
    assert counts(again) == counts(first) == (2, 1, 0, 1)
    assert (folder / REASONING).read_bytes() == before


def test_rows_without_labels_take_two_turns(tmp_path: Path) -> None:
    folder = corpus(tmp_path, row("a", request_label=None), row("b", request_label=None), row("c"))
    asked = requests(folder)
    assert [one["custom_id"] for one in asked] == [
        *(f"label-{number}/{name}" for name in "ab" for number in (1, 2, 3)),
        "reasoning-1/c",
    ]
    assert "true answers" not in system_of(asked[0]["body"])
    words = {"label-1/a": "harmful", "label-2/a": "unharmful", "label-3/a": "harmful"}
    words |= {"label-1/b": "harmful", "label-2/b": "?", "label-3/b": "unharmful"}
    votes = [result(name, Reply(answer(word))) for name, word in words.items()]
    # The second vote about a row has no answer yet.
    first = read(folder, *votes[:1], result("label-2/a", Reply(), status=500), *votes[2:])
    assert first.progress.skipped.rows == [("b", "no majority")]
    asked = requests(folder)
    assert [one["custom_id"] for one in asked] == ["label-2/a", "reasoning-1/c"]
    assert counts(read(folder, votes[1])) == (3, 0, 1, 2)
    asked = requests(folder)
    assert [one["custom_id"] for one in asked] == ["reasoning-1/a", "reasoning-1/c"]
    assert "Request: harmful" in system_of(asked[0]["body"])
    assert counts(read(folder, *answered(asked))) == (3, 2, 1, 0)
    labelled = next(iter(read_corpus(folder)))
    assert (labelled.request_label, labelled.meta["votes"]) == ("harmful", {"request": 2})


def test_rows_that_cannot_be_sent_are_reported(tmp_path: Path) -> None:
    broken = row("broken", modality="image", images=(str(tmp_path / "none.png"),))
    written = write_batch_requests(
        corpus(tmp_path, row("a", prompt=" "), broken, row("b")), tmp_path / "ask.jsonl", Chat()
    )
    assert written.requests == 1
    assert written.skipped.rows == [("a", "nothing to judge"), ("broken", "invalid_image")]


def test_batches_and_runs_share_their_attempts(tmp_path: Path) -> None:
    folder = corpus(tmp_path, row("a"), row("b"))
    read(folder, *answered(requests(folder))[:1])
    report = run(folder, RulesTeacher())
    assert (report.asked, report.kept, report.attempts) == (1, 2, 2)
    assert {sample.meta["teacher"] for sample in read_corpus(folder)} == {DEFAULT_MODEL, "rules"}


def test_files_that_are_not_there(tmp_path: Path) -> None:
    folder = corpus(tmp_path, row("a"))
    with pytest.raises(DataError, match="give a file of batch results"):
        read_results(folder, [tmp_path / "none.jsonl"], DEFAULT_MODEL)
    with pytest.raises(DataError, match="curate --out"):
        write_batch_requests(tmp_path / "none", tmp_path / "ask.jsonl", Chat())
