"""Guard a model's answers in OpenAI's format: which parts are judged, and how a stream waits for its verdicts.

A blocked answer has `finish_reason: content_filter` and a refusal, which OpenAI's clients understand.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from guardreasoner_vl.engines.openai.chat_stream import (
    CALL_TEXTS,
    CALLED,
    FAILED,
    TEXTS,
    ChatEvents,
    ReportedError,
    UpstreamError,
)
from guardreasoner_vl.engines.openai.mending import plain
from guardreasoner_vl.engines.openai.sse import MAX_BYTES, TooLongError
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.service.chat_fields import allowed_choice, allowed_message
from guardreasoner_vl.service.wire import blocked_reason, error_body
from guardreasoner_vl.types.exchange import REASONING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping

    from guardreasoner_vl.types import Verdict

    Judge = Callable[[dict[str, Any]], Coroutine[Any, Any, Verdict]]

T = TypeVar("T")
FILTERED = "content_filter"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""The exceptions that reading an answer of unknown form raises."""
UNREADABLE = (
    "guard_error",
    "the answer has an unknown form and cannot be judged: check that the model's server has OpenAI's API",
)
_COMPLETION_METADATA = ("id", "object", "created", "model", "system_fingerprint", "service_tier", "usage")
END = b"data: [DONE]\n\n"
_CHUNK = 100
"""Characters that a buffered chunk counts besides its text, so that chunks without text are bounded too."""

_UNCHANGED = ("refusal", "tool_calls", "function_call", "audio")


def judged_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message in the form that is judged: reasoning counts as text, generated images as image parts."""
    content = message.get("content")
    parts = list(content) if isinstance(content, list) else _text_parts(content)
    reasoning = [part for name in REASONING for part in _text_parts(message.get(name))]
    parts = [*reasoning, *parts, *(message.get("images") or ())]
    kept = {name: message[name] for name in _UNCHANGED if message.get(name) is not None}
    return {"role": "assistant", "content": parts or None, **kept}


def as_judged(message: dict[str, Any]) -> dict[str, Any]:
    """A message of a request in the form that is judged: the reasoning of an earlier answer counts as text."""
    return judged_message(message) if any(message.get(name) for name in REASONING) else message


def _text_parts(text: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


@dataclass
class PartialAnswer:
    """One of `n` streamed answers, accumulated from its deltas."""

    message: dict[str, Any] = field(default_factory=dict)
    calls: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)

    def add(self, delta: Mapping[str, Any]) -> int:
        """Append a delta; returns the number of new characters. Raises one of `MALFORMED` if it is not a delta."""
        added = sum(_extend(self.message, name, delta.get(name)) for name in TEXTS)
        for piece in delta.get("tool_calls") or ():
            for kind in CALLED:
                if piece.get(kind):
                    added += self._add_call(piece, kind)
        if legacy := delta.get("function_call"):
            called = self.message.setdefault("function_call", {})
            added += sum(_extend(called, name, legacy.get(name)) for name in CALL_TEXTS)
        for name in ("images", "audio"):
            if delta.get(name):
                self.message[name] = [*self.message.get(name, ()), *delta[name]] if name == "images" else delta[name]
                added += 1
        return added

    @property
    def has_calls(self) -> bool:
        """Whether the answer contains a tool call, complete or not."""
        return bool(self.calls) or "function_call" in self.message

    @property
    def whole(self) -> dict[str, Any]:
        """The message so far, tool calls included."""
        calls = [call for _, call in sorted(self.calls.items())]
        return {**self.message, **({"tool_calls": calls} if calls else {})}

    @property
    def judged(self) -> dict[str, Any]:
        """The message so far, in the form that is judged."""
        return judged_message(plain(self.whole))

    def _add_call(self, piece: Mapping[str, Any], kind: str) -> int:
        call = self.calls.setdefault((piece.get("index") or 0, kind), {"type": kind, kind: {}})
        if piece.get("id"):
            call["id"] = piece["id"]
        return sum(_extend(call[kind], name, piece[kind].get(name)) for name in CALL_TEXTS)


def _extend(fields: dict[str, Any], name: str, text: Any) -> int:
    if text is None:
        return 0
    if not isinstance(text, str):
        raise ValueError(f"the field {name} of a delta is not a string")
    fields[name] = fields.get(name, "") + text
    return len(text)


@dataclass
class StreamBuffer(Generic[T]):
    """Buffers the pieces of a streamed answer: a piece is released only after everything up to it was judged.

    `judge` judges the whole answer so far, whenever at least `window` new characters came. `verdict` is the last
    verdict; after a block nothing is released any more.
    """

    judge: Callable[[], Coroutine[Any, Any, Verdict]]
    window: int
    verdict: Verdict | None = None
    _pieces: list[T] = field(default_factory=list)
    _new: int = 0

    @property
    def is_blocked(self) -> bool:
        """Whether the last verdict blocks."""
        return self.verdict is not None and self.verdict.action == "block"

    async def add(self, piece: T, characters: int, *, whole: bool = False) -> list[T]:
        """Buffer a piece and return the pieces to release now; none if only the `whole` answer can be judged."""
        self._pieces.append(piece)
        self._new += characters
        return [] if whole or self._new < self.window else await self.finish()

    async def finish(self) -> list[T]:
        """Judge what is new and return the buffered pieces, or none if the answer is blocked."""
        if self._new and not self.is_blocked:
            self.verdict = await self.judge()
            self._new = 0
        released, self._pieces = ([] if self.is_blocked else self._pieces), []
        return released


class ChatStreamBuffer(StreamBuffer[T]):
    """A `StreamBuffer` of chat chunks with one answer or several; a block of one answer ends all.

    `judge` judges each answer so far; from the first tool call on only at the end, since half a call cannot be judged.
    """

    def __init__(self, judge: Judge, window: int) -> None:
        super().__init__(self._judge_all, window)
        self.answers: dict[int, PartialAnswer] = {}
        self._judge_answer = judge
        self._characters = 0

    async def add_chunk(self, chunk: T, choices: Iterable[Mapping[str, Any]]) -> list[T]:
        """Buffer a chunk and return the chunks to release now.

        Raises one of `MALFORMED` for a malformed choice, and `TooLongError` if more text waits than is kept in memory.
        """
        added = 0
        for choice in choices:
            answer = self.answers.setdefault(choice.get("index") or 0, PartialAnswer())
            added += answer.add(choice.get("delta") or {})
        self._characters += added
        if self._characters + _CHUNK * len(self._pieces) > MAX_BYTES:
            raise TooLongError("the model's answer", MAX_BYTES)
        return await self.add(chunk, added, whole=any(answer.has_calls for answer in self.answers.values()))

    async def _judge_all(self) -> Verdict:
        verdicts = await gather_or_cancel(self._judge_answer(answer.judged) for answer in self.answers.values())
        return next((verdict for verdict in verdicts if verdict.action == "block"), verdicts[0])


class GuardedStream:
    """Parses server-sent chat chunks and rewrites them: only judged fields are sent, and only after their verdict.

    A blocked answer ends in `finish_reason: content_filter` and a refusal. A malformed chunk, an error reported by the
    model's server, or an early end of the stream ends it in an error without `[DONE]`; buffered text is dropped. `over`
    says that nothing more will be sent.
    """

    def __init__(self, judge: Judge, window: int) -> None:
        self._judge = judge
        self._buffer: ChatStreamBuffer[dict[str, Any]] = ChatStreamBuffer(judge, window)
        self._events = ChatEvents()
        self._last: dict[str, Any] = {}
        self.over = False

    async def add(self, body: bytes) -> bytes:
        """Read a part of the upstream's body; returns the bytes to send now."""
        return await self._out(self._events.feed(body), ended=False)

    async def finish(self) -> bytes:
        """End the stream once the upstream's body has ended; returns the last bytes to send."""
        return await self._out(self._events.finish(), ended=True)

    async def lost(self, message: str) -> bytes:
        """End the stream after a lost connection; returns the last bytes, an error unless the answer is complete."""
        return await self.finish() if self._events.is_whole else self._broken(UpstreamError.code, message)

    def _broken(self, code: str, message: str) -> bytes:
        self.over = True
        return data_event(error_body(code, message))

    async def _out(self, chunks: Iterator[dict[str, Any]], *, ended: bool) -> bytes:
        if self.over:
            return b""
        out: list[dict[str, Any]] = []
        try:
            for chunk in chunks:
                self._last = allowed_chunk(chunk)
                out += await self._buffer.add_chunk(self._last, self._last["choices"])
                out += self._refusal()
                if self.over:
                    break
            if not self.over and (ended or self._events.done):
                out += await self._buffer.finish()
                out += self._refusal()
                self.over = True
            end = END if self.over else b""
        except ReportedError as error:
            end = self._broken(error.code, await quotable(str(error), self._judge))
        except EngineError as error:
            end = self._broken(UpstreamError.code, str(error))
        except MALFORMED:
            end = self._broken(*UNREADABLE)
        return b"".join(map(data_event, out)) + end

    def _refusal(self) -> list[dict[str, Any]]:
        """The last chunk of a blocked stream; empty if it is not blocked."""
        verdict = self._buffer.verdict
        if verdict is None or not self._buffer.is_blocked:
            return []
        self.over = True
        delta = {"refusal": blocked_reason(verdict)}
        answers = sorted(self._buffer.answers)
        choices = [{"index": index, "delta": delta, "finish_reason": FILTERED} for index in answers]
        return [{**self._last, "usage": None, "choices": choices}]


async def quotable(message: str, judge: Judge) -> str:
    """The message of an upstream error if the guard allows it, else `FAILED`."""
    verdict = await judge(judged_message({"content": message}))
    return message if verdict.action == "allow" else FAILED


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all coroutines; returns their results in order. The first exception cancels the rest."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def allowed_chunk(chunk: Mapping[str, Any]) -> dict[str, Any]:
    """The judged fields of a chunk; log-probabilities repeat the text and are dropped. Raises one of `MALFORMED`."""
    choices = [
        {**allowed_choice(choice), "delta": allowed_message(choice.get("delta") or {})}
        for choice in chunk.get("choices") or ()
    ]
    judged: dict[str, Any] = plain({**completion_metadata(chunk), "choices": choices})
    return judged


def token_text(logprobs: Any) -> str:
    """The joined tokens of a choice's log-probabilities; some servers list text there that its message lacks."""
    lists = logprobs.values() if isinstance(logprobs, dict) else ()
    tokens = [token for listed in lists if isinstance(listed, list) for token in listed]
    return "".join(str(token["token"]) for token in tokens if isinstance(token, dict) and token.get("token"))


def completion_metadata(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a chunk or a completion, other than its choices, that are sent unchanged."""
    return {name: answer[name] for name in _COMPLETION_METADATA if name in answer}


def data_event(content: Mapping[str, Any]) -> bytes:
    """A server-sent event without a name, with JSON data."""
    return f"data: {json.dumps(content)}\n\n".encode()
