"""Decodes server-sent events (the HTML standard's event streams) from bytes that are split at any point.

No library fits: the decoders of httpx-sse and the openai client are private, have no size limit and ignore the rule
about a byte order mark; sseclient-py reads from a blocking stream.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

MAX_BYTES = 32_000_000
"""Largest size of one event, or of a whole answer, in bytes: it is kept in memory."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\r|\n")


class TooLongError(EngineError):
    """An event or an answer is larger than the limit on memory."""

    def __init__(self, subject: str, max_bytes: int) -> None:
        super().__init__(f"{subject} has more than {max_bytes:,} bytes: request a shorter answer")


@dataclass(frozen=True)
class Event:
    """One event; `name` is "" if the event has none. Ids and retry times serve reconnecting and are dropped."""

    name: str
    data: str


class EventDecoder:
    """Decodes events from bytes split at any point: lines end in CR, LF or CRLF, invalid UTF-8 becomes U+FFFD.

    Events without data are skipped, as the standard requires. Raises `TooLongError` for an event of more than
    `max_bytes` bytes.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
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
        """The last event at the end of the stream, complete or not, because servers omit the last blank line."""
        yield from self._end_line()
        yield from self._end_event()

    def _extend(self, more: bytes) -> None:
        self._line += more
        if self._bytes + len(self._line) > self._max_bytes:
            raise TooLongError("an event of the stream", self._max_bytes)

    def _end_line(self) -> Iterator[Event]:
        line, self._line = bytes(self._line), bytearray()
        if self._at_start:
            line, self._at_start = line.removeprefix(BYTE_ORDER_MARK), False
        if not line:
            yield from self._end_event()
            return
        field, _, value = line.partition(b":")  # a comment has an empty field name
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


async def ndjson_lines(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Lines of NDJSON from bytes that are split at any point, without a byte order mark.

    Only a newline ends a line: JSON may contain Unicode line ends, and CR is white space in JSON.
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
