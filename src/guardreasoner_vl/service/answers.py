"""A model's answers in OpenAI's shape: what of them is judged, and how a streamed one is held back until it was.

What a blocked client sees is what OpenAI's clients know: `finish_reason: content_filter` and a refusal.
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
    REASONING,
    TEXTS,
    ChatEvents,
    ReportedError,
    UpstreamError,
)
from guardreasoner_vl.engines.openai.mending import plain
from guardreasoner_vl.engines.openai.sse import MOST_BYTES, TooLongError
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.service.passing import leaving, leaving_choice
from guardreasoner_vl.service.wire import blocked_reason, fault

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping

    from guardreasoner_vl.types import Verdict

    Judge = Callable[[dict[str, Any]], Coroutine[Any, Any, Verdict]]

T = TypeVar("T")
FILTERED = "content_filter"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading an answer that has no known form raises."""
UNREADABLE = ("guard_error", "the answer is in no form that can be judged")
_BESIDE_CHOICES = ("id", "object", "created", "model", "system_fingerprint", "service_tier", "usage")
END = b"data: [DONE]\n\n"
_CHUNK = 100
"""What a held chunk counts beside its characters, for an answer that goes on without any."""

_AS_THEY_ARE = ("refusal", "tool_calls", "function_call", "audio")


def answer_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as it is judged: reasoning that is shown counts as text, generated images are seen."""
    content = message.get("content")
    parts = list(content) if isinstance(content, list) else _text_parts(content)
    reasoning = [part for name in REASONING for part in _text_parts(message.get(name))]
    parts = [*reasoning, *parts, *(message.get("images") or ())]
    kept = {name: message[name] for name in _AS_THEY_ARE if message.get(name) is not None}
    return {"role": "assistant", "content": parts or None, **kept}


def as_judged(message: dict[str, Any]) -> dict[str, Any]:
    """A message of a request as it is judged: an earlier answer's reasoning counts as its text."""
    return answer_of(message) if any(message.get(name) for name in REASONING) else message


def _text_parts(text: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


@dataclass
class GrowingAnswer:
    """One of `n` answers as far as it has come."""

    message: dict[str, Any] = field(default_factory=dict)
    calls: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)

    def add(self, delta: Mapping[str, Any]) -> int:
        """How many characters came. Raises one of `MALFORMED` for what is not a delta."""
        came = sum(_extend(self.message, name, delta.get(name)) for name in TEXTS)
        for piece in delta.get("tool_calls") or ():
            for kind in CALLED:
                if piece.get(kind):
                    came += self._called(piece, kind)
        if legacy := delta.get("function_call"):
            called = self.message.setdefault("function_call", {})
            came += sum(_extend(called, name, legacy.get(name)) for name in CALL_TEXTS)
        for name in ("images", "audio"):
            if delta.get(name):
                self.message[name] = [*self.message.get(name, ()), *delta[name]] if name == "images" else delta[name]
                came += 1
        return came

    @property
    def has_calls(self) -> bool:
        return bool(self.calls) or "function_call" in self.message

    @property
    def whole(self) -> dict[str, Any]:
        """The message."""
        calls = [call for _, call in sorted(self.calls.items())]
        return {**self.message, **({"tool_calls": calls} if calls else {})}

    @property
    def judged(self) -> dict[str, Any]:
        return answer_of(plain(self.whole))

    def _called(self, piece: Mapping[str, Any], kind: str) -> int:
        call = self.calls.setdefault((piece.get("index") or 0, kind), {"type": kind, kind: {}})
        if piece.get("id"):
            call["id"] = piece["id"]
        return sum(_extend(call[kind], name, piece[kind].get(name)) for name in CALL_TEXTS)


def _extend(where: dict[str, Any], name: str, text: Any) -> int:
    if text is None:
        return 0
    if not isinstance(text, str):
        raise ValueError(f"a delta's {name} is no string")
    where[name] = where.get(name, "") + text
    return len(text)


@dataclass
class HeldBack(Generic[T]):
    """Pieces of an answer on their way out: none leaves before everything up to it was judged.

    `judge` is asked about all that has come, each time at least `window` characters of it are new. `verdict` is what it
    said last; after a block nothing leaves any more.
    """

    judge: Callable[[], Coroutine[Any, Any, Verdict]]
    window: int
    verdict: Verdict | None = None
    _held: list[T] = field(default_factory=list)
    _new: int = 0

    @property
    def is_blocked(self) -> bool:
        return self.verdict is not None and self.verdict.action == "block"

    async def add(self, piece: T, characters: int, *, whole: bool = False) -> list[T]:
        """What may leave now; nothing before the end where only the `whole` can be judged."""
        self._held.append(piece)
        self._new += characters
        return [] if whole or self._new < self.window else await self.finish()

    async def finish(self) -> list[T]:
        """What may leave without waiting for more."""
        if self._new and not self.is_blocked:
            self.verdict = await self.judge()
            self._new = 0
        released, self._held = ([] if self.is_blocked else self._held), []
        return released


class HeldAnswers(HeldBack[T]):
    """Chunks of a stream in OpenAI's shape, one answer or several; if one of them is blocked, all end.

    `judge` is asked about each answer as far as it has come; from the first tool call on only at the end, since half a
    call cannot be judged.
    """

    def __init__(self, judge: Judge, window: int) -> None:
        super().__init__(self._worst, window)
        self.answers: dict[int, GrowingAnswer] = {}
        self._judge_one = judge
        self._characters = 0

    async def add_chunk(self, chunk: T, choices: Iterable[Mapping[str, Any]]) -> list[T]:
        """What may leave now that `chunk`, with its choices, has come.

        Raises `ValueError` for what is no choice, and `TooLongError` for more than is held in memory.
        """
        came = 0
        for choice in choices:
            answer = self.answers.setdefault(choice.get("index") or 0, GrowingAnswer())
            came += answer.add(choice.get("delta") or {})
        self._characters += came
        if self._characters + _CHUNK * len(self._held) > MOST_BYTES:
            raise TooLongError("the model's answer", MOST_BYTES)
        return await self.add(chunk, came, whole=any(answer.has_calls for answer in self.answers.values()))

    async def _worst(self) -> Verdict:
        verdicts = await all_of(self._judge_one(answer.judged) for answer in self.answers.values())
        return next((one for one in verdicts if one.action == "block"), verdicts[0])


class GuardedStream:
    """Server-sent chat chunks, read as bytes and written anew: only judged fields, and only after their verdict.

    A blocked answer ends in `finish_reason: content_filter` and a refusal. A chunk that cannot be read, an error that
    the model's server reports, or an end before the answer is whole ends the stream in an error without `[DONE]`; text
    held back until then is dropped. `over` says that nothing more will be sent.
    """

    def __init__(self, judge: Judge, window: int) -> None:
        self._judge = judge
        self._held: HeldAnswers[dict[str, Any]] = HeldAnswers(judge, window)
        self._events = ChatEvents()
        self._last: dict[str, Any] = {}
        self.over = False

    async def add(self, body: bytes) -> bytes:
        """The bytes that may be sent now."""
        return await self._out(self._events.feed(body), ended=False)

    async def finish(self) -> bytes:
        """The bytes that may still be sent once no more arrive, and the stream's end."""
        return await self._out(self._events.finish(), ended=True)

    async def lost(self, message: str) -> bytes:
        """The stream's end where the connection was lost: an error, unless the answer is whole already."""
        return await self.finish() if self._events.is_whole else self._broken(UpstreamError.code, message)

    def _broken(self, code: str, message: str) -> bytes:
        self.over = True
        return data_event(fault(code, message))

    async def _out(self, chunks: Iterator[dict[str, Any]], *, ended: bool) -> bytes:
        if self.over:
            return b""
        out: list[dict[str, Any]] = []
        try:
            for chunk in chunks:
                self._last = leaving_chunk(chunk)
                out += await self._held.add_chunk(self._last, self._last["choices"])
                out += self._refusal()
                if self.over:
                    break
            if not self.over and (ended or self._events.done):
                out += await self._held.finish()
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
        """The last chunk of a stream that was blocked."""
        verdict = self._held.verdict
        if verdict is None or not self._held.is_blocked:
            return []
        self.over = True
        delta = {"refusal": blocked_reason(verdict)}
        answers = sorted(self._held.answers)
        choices = [{"index": index, "delta": delta, "finish_reason": FILTERED} for index in answers]
        return [{**self._last, "usage": None, "choices": choices}]


async def quotable(message: str, judge: Judge) -> str:
    """The message of an error that came in place of an answer; `FAILED` if the guard blocks it."""
    verdict = await judge(answer_of({"content": message}))
    return message if verdict.action == "allow" else FAILED


async def all_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first fault ends the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def leaving_chunk(chunk: Mapping[str, Any]) -> dict[str, Any]:
    """The judged fields of a chunk, without token log-probabilities, which repeat the text. Raises of `MALFORMED`."""
    choices = [
        {**leaving_choice(choice), "delta": leaving(choice.get("delta") or {})} for choice in chunk.get("choices") or ()
    ]
    judged: dict[str, Any] = plain({**beside_choices(chunk), "choices": choices})
    return judged


def spelled(logprobs: Any) -> str:
    """What the tokens of a choice's log-probabilities spell: more than its texts, where a server leaves some out."""
    lists = logprobs.values() if isinstance(logprobs, dict) else ()
    tokens = [token for listed in lists if isinstance(listed, list) for token in listed]
    return "".join(str(token["token"]) for token in tokens if isinstance(token, dict) and token.get("token"))


def beside_choices(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a chunk or a completion, beside its choices, that are sent on as they are."""
    return {name: answer[name] for name in _BESIDE_CHOICES if name in answer}


def data_event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n".encode()
