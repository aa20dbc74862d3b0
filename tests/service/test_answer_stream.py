"""An answer sent as NDJSON while it is written: whatever a line holds, the last event is a verdict."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.service.clients import app_of, client
from tests.service.scripted_backend import ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FIRST = b'{"prompt": "How do I bake bread?"}\n'
NDJSON = {"content-type": "application/x-ndjson"}


async def told(
    body: bytes | AsyncIterator[bytes], backend: ScriptedBackend | None = None
) -> list[tuple[str, dict[str, Any]]]:
    limits = {"body_bytes": 2_000, "body_seconds": 0.2}
    async with client(app_of(backend, upstream={"window": 10}, limits=limits)) as http:
        answer = await http.post("/v1/guard/stream", content=body, headers=NDJSON)
    assert answer.status_code == 200
    events = [event.split("\n") for event in answer.text.split("\n\n") if event]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in events]


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[]",
        b'{"delta": 1}',
        b'{"delta": "x", "more": 1}',
        b'{"delta": NaN}',
        b"\xff",
        b"[" * 1_500,
    ],
)
async def test_a_line_that_cannot_be_read_ends_in_an_error_verdict(line: bytes) -> None:
    body = FIRST + b'{"delta": "Mix the flour. "}\n{"delta": "Then"}\n' + line + b'\n{"delta": "and more"}\n'
    events = await told(body)
    assert [name for name, _ in events] == ["release", "verdict"]
    assert events[0][1] == {"text": "Mix the flour. "}
    verdict = events[-1][1]
    assert (verdict["error"]["code"], verdict["action"], verdict["flagged"]) == ("invalid_request", "block", None)


async def test_a_body_that_does_not_end_or_is_too_long_ends_in_an_error_verdict() -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield FIRST + b'{"delta": "Mix the flour. "}\n'
        await asyncio.sleep(2)

    async def endless() -> AsyncIterator[bytes]:
        yield FIRST + b'{"delta": "Mix the flour. "}\n'
        for _ in range(300):
            yield b'{"delta": "."}\n'

    for body in (stalled(), endless()):
        events = await told(body)
        assert events[-1][0] == "verdict"
        assert (events[-1][1]["action"], events[-1][1]["flagged"]) == ("block", None)


async def test_a_byte_order_mark_is_left_out() -> None:
    events = await told(b"\xef\xbb\xbf" + FIRST + b'{"delta": "Mix."}')
    assert [name for name, _ in events] == ["release", "verdict"]
    assert events[-1][1]["action"] == "allow"


async def test_the_halves_of_a_character_come_together() -> None:
    backend = ScriptedBackend()
    lines = [b'{"delta": "Mix the flour \\ud83d"}', b'{"delta": "\\ude00 well."}', b'{"delta": "And \\ud83d"}']
    events = await told(FIRST + b"\n".join(lines), backend)
    released = [data["text"] for name, data in events if name == "release"]
    assert released == ["Mix the flour ", "\U0001f600 well.And ", "\ufffd"]
    assert backend.judged[-1].response == "Mix the flour \U0001f600 well.And \ufffd"
    assert events[-1][1]["action"] == "allow"


async def test_a_first_line_that_is_no_request_is_refused() -> None:
    async with client(app_of()) as http:
        for body in (b"", b"\n\n", b"[]\n", b'{"prompt": "x", "response": "y"}\n'):
            answer = await http.post("/v1/guard/stream", content=body, headers=NDJSON)
            assert answer.status_code in (400, 422)
