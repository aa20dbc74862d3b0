"""The reader of server-sent events: the same events wherever the bytes are split."""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.engines.openai.chat_stream import ChatEvents
from guardreasoner_vl.engines.openai.mending import Halves, mended, plain
from guardreasoner_vl.engines.openai.sse import Event, EventDecoder, TooLongError, ndjson_lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)
END = st.sampled_from(["\n", "\r", "\r\n"])
SILENT = st.sampled_from([": a comment", ":", "id: 1", "retry: 10", "retry", "dat: x", "other", " data: x"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[Event]]:
    """A stream written in every way that the standard allows, and its events."""
    written, events = draw(st.sampled_from(["", "\ufeff"])), []

    def write(line: str) -> None:
        nonlocal written
        # A lone CR before a line feed would be one line end.
        written += line + draw(END if written[-1:] != "\r" or line else st.sampled_from(["\r", "\r\n"]))

    for _ in range(draw(st.integers(0, 4))):
        data, name = draw(st.lists(LINE, max_size=3)), draw(st.sampled_from(["", "error"]))
        for line in draw(st.lists(SILENT, max_size=2)):
            write(line)
        if name:
            write(f"event:{draw(st.sampled_from(['', ' ']))}{name}")
        for line in data:
            write("data" if line == "" and draw(st.booleans()) else f"data:{_space(line)}{line}")
        write("")
        if "\n".join(data):
            events.append(Event(name, "\n".join(data)))
    return written.encode(), events


def _space(line: str) -> str:
    return " " if line[:1] == " " or len(line) % 2 else ""


def decoded(pieces: list[bytes]) -> list[Event]:
    decoder = EventDecoder()
    return [*chain.from_iterable(list(decoder.feed(piece)) for piece in pieces), *decoder.finish()]


def cut(body: bytes, sizes: list[int]) -> list[bytes]:
    pieces: list[bytes] = []
    at = 0
    while at < len(body):
        pieces.append(body[at : at + sizes[len(pieces) % len(sizes)]])
        at += len(pieces[-1])
        if at % 3 == 0:
            pieces.append(b"")
    return pieces


@pytest.mark.slow
@given(streams(), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_the_same_events_however_the_bytes_are_cut(stream: tuple[bytes, list[Event]], sizes: list[int]) -> None:
    body, events = stream
    assert decoded([body]) == decoded(cut(body, sizes)) == events


@given(st.binary(max_size=60), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_any_bytes_are_read_in_one_way(body: bytes, sizes: list[int]) -> None:
    body = body.replace(b"\x00", b"\ndata:").replace(b"\x01", b"\r").replace(b"\x02", b"\n\n")
    assert decoded([body]) == decoded(cut(body, sizes))


def test_an_event_is_returned_when_it_is_complete() -> None:
    decoder = EventDecoder()
    assert list(decoder.feed(b"data: a\r\r")) == [Event("", "a")]
    assert list(decoder.feed(b"\ndata: b\n\n")) == [Event("", "b")]


@pytest.mark.parametrize("line", [b"x" * 200, b"data: " + b"x" * 60 + b"\ndata: " + b"x" * 60])
def test_an_event_has_a_limit(line: bytes) -> None:
    with pytest.raises(TooLongError, match="more than 100 bytes"):
        list(EventDecoder(100).feed(line))
    decoder = EventDecoder(100)
    for _ in range(5):
        assert list(decoder.feed(b"data: " + b"x" * 80 + b"\n\n")) == [Event("", "x" * 80)]


async def test_lines_of_ndjson() -> None:
    async def pieces(size: int) -> list[bytes]:
        body = b"\xef\xbb\xbf{}\r\n\n[1\r,2]\nlast \xe2\x80\xa8 line"

        async def sent() -> AsyncIterator[bytes]:
            for at in range(0, len(body), size):
                yield body[at : at + size]

        return [line async for line in ndjson_lines(sent())]

    for size in (1, 2, 3, 100):
        assert await pieces(size) == [b"{}\r", b"", b"[1\r,2]", b"last \xe2\x80\xa8 line"]


@given(st.text(max_size=20), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_halves_of_characters_come_together(text: str, sizes: list[int]) -> None:
    units = text.encode("utf-16-le")
    pieces = [piece.decode("utf-16-le", "surrogatepass") for piece in cut(units, [2 * size for size in sizes])]
    halves = Halves()
    joined = [halves.join((), piece) for piece in pieces]
    assert "".join(joined) == text
    assert list(halves.unpaired()) == []
    assert all(piece == mended(piece) for piece in joined)


def test_each_text_waits_for_its_own_half() -> None:
    def call(index: int, text: str, choice: int = 0) -> dict[str, object]:
        calls = [{"index": index, "function": {"arguments": text}}]
        return {"choices": [{"index": choice, "delta": {"tool_calls": calls, "content": None}}]}

    events = ChatEvents()
    chunks = [call(0, "a\ud83d"), call(1, "b\ud83d"), call(0, "x\ud83d", 1), call(1, "\ude01"), call(0, "\ude00")]
    joined = [
        (choice["index"], piece["index"], piece["function"]["arguments"])
        for chunk in chunks
        for read in events.feed(f"data: {json.dumps(chunk)}\n\n".encode())
        for choice in read["choices"]
        for piece in choice["delta"]["tool_calls"]
    ]
    assert joined == [(0, 0, "a"), (0, 1, "b"), (1, 0, "x"), (0, 1, "\U0001f601"), (0, 0, "\U0001f600")]
    ends = json.dumps({"choices": [{"index": 1, "finish_reason": "tool_calls"}]})
    (last,) = events.feed(f"data: {ends}\n\n".encode())
    (lone,) = last["choices"][0]["delta"]["tool_calls"]
    assert lone == {"index": 0, "function": {"arguments": "\ufffd"}}


def test_json_that_can_be_written_again() -> None:
    odd = {"\ud800": [float("nan"), float("inf"), 1.5, None, True, {"a": "\ud83d\ude00\udead"}]}
    assert plain(odd) == {"\ufffd": [None, None, 1.5, None, True, {"a": "\U0001f600\ufffd"}]}
