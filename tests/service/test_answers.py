"""Buffered text is released only after its verdict, for any pieces and any window."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.judging.judge import error_verdict
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.service.answers import GuardedStream, StreamBuffer
from tests.service.verdicts import MODEL, verdict

if TYPE_CHECKING:
    from guardreasoner_vl.types import Verdict


class Answer:
    """A streamed answer and its judge: BAD is harmful, and the judged texts are recorded."""

    def __init__(self, window: int) -> None:
        self.text = ""
        self.asked: list[str] = []
        self.held: StreamBuffer[str] = StreamBuffer(self._judge, window)

    async def add(self, piece: str) -> str:
        self.text += piece
        return "".join(await self.held.add(piece, len(piece)))

    async def finish(self) -> str:
        return "".join(await self.held.finish())

    async def _judge(self) -> Verdict:
        self.asked.append(self.text)
        if "BROKEN" in self.text:
            return error_verdict(EngineError("out of order; try again"), Policy(), MODEL)
        return verdict("BAD" in self.text)


@pytest.mark.slow
@given(st.lists(st.text(max_size=12), max_size=12), st.integers(1, 30))
def test_nothing_leaves_unjudged_and_nothing_harmless_is_lost(pieces: list[str], window: int) -> None:
    async def run() -> tuple[str, list[str]]:
        answer = Answer(window)
        out = ""
        for piece in pieces:
            out += await answer.add(piece)
            assert out == "" or answer.asked[-1].startswith(out)
        return out + await answer.finish(), answer.asked

    out, asked = asyncio.run(run())
    assert out == "".join(pieces)
    assert not out or asked[-1] == out


@pytest.mark.parametrize("word", ["BAD", "BROKEN"])
async def test_after_a_block_nothing_leaves_any_more(word: str) -> None:
    answer = Answer(10)
    first = await answer.add("All is well, so far. ")
    second = await answer.add(f"Now comes something {word} for you.")
    asked = len(answer.asked)
    rest = [await answer.add("And then harmless words again."), await answer.finish()]
    assert (first, second, rest) == ("All is well, so far. ", "", ["", ""])
    assert answer.held.is_blocked
    assert len(answer.asked) == asked


async def test_after_its_end_a_stream_says_nothing_more() -> None:
    async def judge(_: object) -> Verdict:
        return verdict(False)

    stream = GuardedStream(judge, 10)
    line = b'data: {"choices": [{"index": 0, "delta": {"content": "Hello."}}]}\n\n'
    assert await stream.add(line) == b""
    out = await stream.add(b"data: [DONE]\n\n")
    assert out.endswith(b"data: [DONE]\n\n")
    assert b"Hello." in out
    assert [await stream.add(line), await stream.finish()] == [b"", b""]


async def test_a_stream_of_nothing_is_broken() -> None:
    async def judge(_: object) -> Verdict:
        raise AssertionError("there is nothing to judge")

    out = await GuardedStream(judge, 10).finish()
    assert b'"code": "upstream"' in out
    assert b"[DONE]" not in out


def _event(**choice: object) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() + b"\n\n"


FRAGMENTS = [
    *(_event(delta={"content": text}) for text in ("Fine. ", "Some words ", "BAD", "\ud83d", "\ude00")),
    _event(delta={"content": None}, finish_reason="stop"),
    _event(delta={"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}),
    _event(delta={"reasoning": "Hm."}, index=1),
    b'data: {"error": {"message": "down"}}\n\n',
    b"data: [DONE]\n\n",
    b"data: nonsense\n\n",
    b"data: [DONE]",
    b": comment\r\n\r",
    b"data\n\n",
    b"event: error\n",
    b"\xff\n",
]


@pytest.mark.slow
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=10), st.lists(st.integers(1, 40), min_size=1), st.integers(1, 30))
def test_a_stream_ends_in_one_way_however_its_bytes_are_cut(body: list[bytes], sizes: list[int], window: int) -> None:
    async def judge(answer: dict[str, Any]) -> Verdict:
        return verdict("BAD" in json.dumps(answer))

    async def run(pieces: list[bytes]) -> bytes:
        stream = GuardedStream(judge, window)
        out = b"".join([await stream.add(piece) for piece in pieces]) + await stream.finish()
        assert stream.over
        assert await stream.finish() == b""
        return out

    sent, at = b"".join(body), 0
    pieces: list[bytes] = []
    while at < len(sent):
        pieces.append(sent[at : at + sizes[len(pieces) % len(sizes)]])
        at += len(pieces[-1])
    out = asyncio.run(run(pieces))
    assert out == asyncio.run(run([sent]))
    assert b"BAD" not in out
    assert out.endswith(b"data: [DONE]\n\n") != (b'"error": ' in out)
