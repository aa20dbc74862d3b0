"""The Batch API's lines: requests as it wants them, results read whatever they are, files within its limits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.engines.openai.http import HttpError
from guardreasoner_vl.teachers import batch_api
from guardreasoner_vl.teachers.base import TeacherAnswer
from guardreasoner_vl.teachers.batch_api import RequestFiles, Result, read_result, request_line
from tests.teachers.teacher_server import Reply, completion

if TYPE_CHECKING:
    from pathlib import Path


def result(custom_id: Any = "a", status: int = 200, **fields: Any) -> bytes:
    response = {"status_code": status, "request_id": "x", "body": completion(Reply("hi", usage=(7, 3)))}
    return json.dumps(
        {"id": "batch_req_1", "custom_id": custom_id, "response": response, "error": None, **fields}
    ).encode()


def test_a_request_is_one_line_of_ascii() -> None:
    line = request_line("reasoning-1/caf\u00e9", {"model": "m", "messages": ["\u2028\n"]})
    assert line.isascii()
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "custom_id": "reasoning-1/caf\u00e9",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": ["\u2028\n"]},
    }


def test_an_answer_is_read_as_online() -> None:
    assert read_result(result()) == Result("a", TeacherAnswer("hi", "stop", 7, 3))
    assert read_result(result() + b"\n") == read_result(result())


@pytest.mark.parametrize(
    ("line", "code", "status"),
    [
        (result(status=500), "engine", 500),
        (result(status=429), "engine", 429),
        (result(response={"status_code": 200, "body": {"choices": []}}), "malformed", None),
        (result(response={"status_code": 200, "body": None}), "malformed", None),
        (result(response=None, error={"code": "batch_expired", "message": "cakes"}), "batch_expired", None),
        (result(response=None, error={"code": "Odd cakes!", "message": ""}), "no_response", None),
        (result(response=None, error=None), "no_response", None),
    ],
)
def test_a_fault_is_reported_by_its_code_and_quotes_nothing(line: bytes, code: str, status: int | None) -> None:
    read = read_result(line)
    assert read is not None
    assert isinstance(read.outcome, HttpError)
    assert (read.custom_id, read.outcome.code, read.outcome.status) == ("a", code, status)
    assert "cakes" not in str(read.outcome)


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[]", b"cake", b"\xff", b"{}", result(custom_id=None), result(custom_id=3), b"[" * 100_000],
)
def test_what_is_no_result_is_none(line: bytes) -> None:
    assert read_result(line) is None


def test_files_hold_no_more_than_the_api_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_api, "MOST_REQUESTS", 3)
    monkeypatch.setattr(batch_api, "MOST_BYTES", 10)
    with RequestFiles(tmp_path / "ask.jsonl") as files:
        for line in (b"1\n", b"2\n", b"3\n", b"4\n", b"a long one\n", b"12345\n", b"678\n", b"9\n"):
            files.add(line)
        assert not list(tmp_path.glob("*.jsonl"))
    assert files.requests == 8
    assert [path.name for path in files.paths] == [
        "ask.jsonl",
        "ask-2.jsonl",
        "ask-3.jsonl",
        "ask-4.jsonl",
        "ask-5.jsonl",
    ]
    assert [path.read_bytes() for path in files.paths] == [
        b"1\n2\n3\n",
        b"4\n",
        b"a long one\n",
        b"12345\n678\n",
        b"9\n",
    ]
    assert len(list(tmp_path.iterdir())) == 5


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    target = tmp_path / "ask.jsonl"
    target.write_bytes(b"old\n")

    def fail() -> None:
        with RequestFiles(target) as files:
            files.add(b"new\n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("ask.jsonl", b"old\n")]
