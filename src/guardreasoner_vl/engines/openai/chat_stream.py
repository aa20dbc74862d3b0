"""Parses streamed chat completions from server-sent events, for the engine, the proxy and the middleware.

An answer is complete once `[DONE]` has arrived, or a finish reason for every choice that has started.
"""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.engines.openai.mending import REPLACEMENT, Halves, mended
from guardreasoner_vl.engines.openai.sse import Event, EventDecoder
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.types.exchange import REASONING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping

TEXTS = ("content", *REASONING, "refusal")
"""The text fields of a message or a delta."""

CALLED = ("function", "custom")
"""The fields of a tool call that hold what is called."""

CALL_TEXTS = ("name", "arguments", "input")
"""The text fields of what is called."""

FAILED = "the model failed: ask again"
"""The message of an error for which the server gives no reason, or whose reason must not be shown."""

_MAX_MESSAGE = 300  # characters of an error's message


class UpstreamError(EngineError):
    """A server cannot be reached, interrupted its answer, or reports a failure."""

    code = "upstream"


class ReportedError(UpstreamError):
    """An error that the server reported; the message is the server's."""


class CutOffError(UpstreamError):
    """An answer that ended before it was complete."""

    def __init__(self) -> None:
        super().__init__("the model's answer ended before it was complete: ask again")


def is_event_stream(content_type: str) -> bool:
    """Whether `content_type` is that of server-sent events."""
    return _media_type(content_type) == "text/event-stream"


def is_json(content_type: str) -> bool:
    """Whether `content_type` is that of JSON."""
    media_type = _media_type(content_type)
    return media_type == "application/json" or media_type.endswith("+json")


def reported_error(body: Mapping[str, Any]) -> str | None:
    """The message of an error in OpenAI's format, as one line of at most 300 characters; None if `body` has none."""
    error = body.get("error")
    if not error:
        return None
    message = error.get("message") if isinstance(error, dict) else error
    line = " ".join(mended(message).split()) if isinstance(message, str) else ""
    return line[:_MAX_MESSAGE] or FAILED


class ChatEvents:
    """Decodes a stream's bytes, split at any point, into chunks (JSON objects); joins surrogate pairs across deltas.

    Both methods raise `ReportedError` for an error that the server reports, `TooLongError`, and `ValueError` or
    `RecursionError` for an event that is not a JSON object.
    """

    def __init__(self) -> None:
        self._decoder = EventDecoder()
        self._halves: dict[int, Halves] = {}
        self._finished: dict[int, bool] = {}
        self.done = False
        """Whether the server has sent `[DONE]`."""

    @property
    def is_whole(self) -> bool:
        """Whether the answer is complete."""
        return self.done or (bool(self._finished) and all(self._finished.values()))

    def feed(self, body: bytes) -> Iterator[dict[str, Any]]:
        """The chunks that `body` completes; iterate to the end before feeding more."""
        for event in self._decoder.feed(body):
            yield from self._read(event)

    def finish(self) -> Iterator[dict[str, Any]]:
        """The chunk of a last event without a blank line after it. Raises `CutOffError` if the answer is incomplete."""
        for event in self._decoder.finish():
            try:
                yield from self._read(event)
            except (ValueError, RecursionError):
                break  # the stream ended inside the event
        if not self.is_whole:
            raise CutOffError

    def _read(self, event: Event) -> Iterator[dict[str, Any]]:
        data = event.data.strip()
        if self.done or not data:
            return
        if data == "[DONE]":
            self.done = True
            return
        if event.name == "error":
            raise ReportedError(_message_of(data))
        chunk = json.loads(data)
        if not isinstance(chunk, dict):
            raise ValueError("a chunk is not a JSON object")
        if (message := reported_error(chunk)) is not None:
            raise ReportedError(message)
        for choice in _objects(chunk.get("choices")):
            self._mend(choice)
        yield chunk

    def _mend(self, choice: dict[str, Any]) -> None:
        index = _index(choice)
        halves = self._halves.setdefault(index, Halves())
        delta = choice.get("delta")
        for holder, name, place in _texts(delta) if isinstance(delta, dict) else ():
            holder[name] = halves.join(place, holder[name])
        ended = choice.get("finish_reason") is not None
        self._finished[index] = self._finished.get(index, False) or ended
        if ended:
            choice["delta"] = delta = delta if isinstance(delta, dict) else {}
            for place in halves.unpaired():
                _replace(delta, place)


async def chunks_of(stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a stream of bytes, to the end of the answer. Raises what `ChatEvents` raises."""
    events = ChatEvents()
    async with aclosing(stream):
        async for body in stream:
            for chunk in events.feed(body):
                yield chunk
    for chunk in events.finish():
        yield chunk


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _message_of(data: str) -> str:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        content = {}
    return reported_error(content) or reported_error({"error": {"message": content.get("message")}}) or FAILED


def _objects(values: Any) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _index(holder: Mapping[str, Any]) -> int:
    index = holder.get("index")
    return index if isinstance(index, int) else 0


def _texts(delta: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, tuple[Any, ...]]]:
    """Each text of the delta: the object that contains it, its key there, and its place, which later deltas share."""
    for name in TEXTS:
        if isinstance(delta.get(name), str):
            yield delta, name, (name,)
    holders = [(call.get(kind), (_index(call), kind)) for call in _objects(delta.get("tool_calls")) for kind in CALLED]
    for holder, place in [*holders, (delta.get("function_call"), (-1, "function_call"))]:
        if not isinstance(holder, dict):
            continue
        for name in CALL_TEXTS:
            if isinstance(holder.get(name), str):
                yield holder, name, (*place, name)


def _replace(delta: dict[str, Any], place: tuple[Any, ...]) -> None:
    """Append U+FFFD to the text at `place`, for a surrogate whose other half is missing."""
    match place:
        case (name,):
            delta[name] = (delta.get(name) or "") + REPLACEMENT
        case (-1, kind, name):
            called = delta.get(kind) or {}
            delta[kind] = {**called, name: (called.get(name) or "") + REPLACEMENT}
        case (index, kind, name):
            calls = delta.get("tool_calls") or []
            delta["tool_calls"] = [*calls, {"index": index, kind: {name: REPLACEMENT}}]
