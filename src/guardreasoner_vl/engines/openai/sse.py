"""Server-sent events, decoded from bytes that are cut anywhere (the HTML standard's event streams).

No library fits: httpx-sse and the openai client keep their decoders private and unbounded and ignore the rule about a
byte order mark, and sseclient-py reads from a blocking stream.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

MOST_BYTES = 32_000_000
"""Bytes that one event, or a whole answer, may have, since it is held in memory."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\r|\n")


class TooLongError(EngineError):
    """An event or an answer has more bytes than may be held in memory."""

    def __init__(self, what: str, most: int) -> None:
        super().__init__(f"{what} has more than {most:,} bytes: ask for less at once")


@dataclass(frozen=True)
class Event:
    """One event; `name` is "" where the stream names none. Ids and retry times, for reconnecting, are left out."""

    name: str
    data: str


class EventDecoder:
    """Gives the same events however the bytes are cut: lines end in CR, LF or CRLF, invalid UTF-8 becomes U+FFFD.

    Events without data are skipped, as the standard says. Raises `TooLongError` for an event of more than `most` bytes.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._line = bytearray()
        self._data: list[bytes] = []
        self._bytes = 0
        self._name = b""
        self._after_cr = False
        self._at_start = True

    def feed(self, body: bytes) -> Iterator[Event]:
        """The events that `body` completes; iterate to the end before feeding more."""
        if self._after_cr and body:
            body = body.removeprefix(b"\n")
            self._after_cr = False
        self._after_cr = self._after_cr or body.endswith(b"\r")
        first, *others = _LINE_END.split(body)
        self._extend(first)
        for more in others:
            yield from self._end_line()
            self._extend(more)

    def finish(self) -> Iterator[Event]:
        """The event that the end of the stream leaves open, complete or not: servers omit the last blank line."""
        yield from self._end_line()
        yield from self._end_event()

    def _extend(self, more: bytes) -> None:
        self._line += more
        if self._bytes + len(self._line) > self._most:
            raise TooLongError("an event of the stream", self._most)

    def _end_line(self) -> Iterator[Event]:
        line, self._line = bytes(self._line), bytearray()
        if self._at_start:
            line, self._at_start = line.removeprefix(BYTE_ORDER_MARK), False
        if not line:
            yield from self._end_event()
            return
        field, _, value = line.partition(b":")  # a comment's field has no name
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            self._bytes += len(value) + 1
        elif field == b"event":
            self._name = value

    def _end_event(self) -> Iterator[Event]:
        data, name = b"\n".join(self._data), self._name
        self._data, self._bytes, self._name = [], 0, b""
        if data:
            yield Event(name.decode("utf-8", "replace"), data.decode("utf-8", "replace"))


async def lines_of(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Lines of NDJSON whose bytes are cut anywhere, without a byte order mark.

    A newline alone ends a line: JSON may hold Unicode's line ends as they are, and CR is white space to it.
    """
    rest = bytearray()
    at_start = True
    async for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest += first
        for more in others:
            line, rest = bytes(rest), bytearray(more)
            yield line.removeprefix(BYTE_ORDER_MARK) if at_start else line
            at_start = False
    if rest:
        yield bytes(rest).removeprefix(BYTE_ORDER_MARK) if at_start else bytes(rest)
