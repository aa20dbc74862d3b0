"""A model's answers in OpenAI's shape: what of them is judged, and how a streamed one is held back until it was.

What a blocked client sees is what OpenAI's clients know: `finish_reason: content_filter` and a refusal.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from guardreasoner_vl.service.wire import blocked_reason, fault

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping

    from guardreasoner_vl.types import Verdict

T = TypeVar("T")
FILTERED = "content_filter"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading an answer that has no known form raises."""
UNREADABLE = ("guard_error", "the answer is in no form that can be judged")
_JUDGED = ("role", "content", "reasoning_content", "refusal", "tool_calls", "function_call")
"""The fields of a message or of a delta that are judged."""
_BESIDE_CHOICES = ("id", "object", "created", "model", "system_fingerprint", "service_tier", "usage")
_END = b"data: [DONE]\n\n"
_AS_THEY_ARE = ("refusal", "tool_calls", "function_call", "audio")


def answer_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as it is judged: reasoning that is shown counts as text, generated pictures are seen."""
    content = message.get("content")
    parts = list(content) if isinstance(content, list) else _text_parts(content)
    parts = [*_text_parts(message.get("reasoning_content")), *parts, *(message.get("images") or ())]
    kept = {name: message[name] for name in _AS_THEY_ARE if message.get(name) is not None}
    return {"role": "assistant", "content": parts or None, **kept}


def _text_parts(text: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


@dataclass
class _Answer:
    """One of `n` answers as far as it has come."""

    message: dict[str, Any] = field(default_factory=dict)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, delta: Mapping[str, Any]) -> int:
        """How many characters came. Raises `ValueError` for what is no delta."""
        came = 0
        for name in ("content", "reasoning_content", "refusal"):
            came += self._extend(self.message, name, delta.get(name))
        pieces = [(piece.get("index") or 0, piece) for piece in delta.get("tool_calls") or ()]
        if legacy := delta.get("function_call"):
            pieces.append((-1, {"function": legacy}))
        for index, piece in pieces:
            call = self.calls.setdefault(index, {"type": "function", "function": {"name": "", "arguments": ""}})
            told = piece.get("function") or piece.get("custom") or {}
            for name, source in (("name", "name"), ("arguments", "arguments"), ("arguments", "input")):
                came += self._extend(call["function"], name, told.get(source))
        for name in ("images", "audio"):
            if delta.get(name):
                self.message[name] = [*self.message.get(name, ()), *delta[name]] if name == "images" else delta[name]
                came += 1
        return came

    @property
    def judged(self) -> dict[str, Any]:
        calls = [call for _, call in sorted(self.calls.items())]
        return answer_of({**self.message, **({"tool_calls": calls} if calls else {})})

    @staticmethod
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

    def __init__(self, judge: Callable[[dict[str, Any]], Coroutine[Any, Any, Verdict]], window: int) -> None:
        super().__init__(self._worst, window)
        self.answers: dict[int, _Answer] = {}
        self._judge_one = judge

    async def add_chunk(self, chunk: T, choices: Iterable[Mapping[str, Any]]) -> list[T]:
        """What may leave now that `chunk`, with its choices, has come. Raises `ValueError` for what is no choice."""
        came = 0
        for choice in choices:
            answer = self.answers.setdefault(choice.get("index") or 0, _Answer())
            came += answer.add(choice.get("delta") or {})
        return await self.add(chunk, came, whole=any(answer.calls for answer in self.answers.values()))

    async def _worst(self) -> Verdict:
        verdicts = await all_of(self._judge_one(answer.judged) for answer in self.answers.values())
        return next((one for one in verdicts if one.action == "block"), verdicts[0])


class GuardedStream:
    """Server-sent chat chunks, read as bytes and written anew: only judged fields, and only after their verdict.

    A block ends it in `finish_reason: content_filter` and a refusal; what cannot be read in an error. `over` says that
    nothing more will leave.
    """

    def __init__(self, judge: Callable[[dict[str, Any]], Coroutine[Any, Any, Verdict]], window: int) -> None:
        self._held: HeldAnswers[dict[str, Any]] = HeldAnswers(judge, window)
        self._rest = b""
        self._last: dict[str, Any] = {}
        self.over = False

    async def add(self, body: bytes) -> bytes:
        """What may leave now."""
        *lines, self._rest = (self._rest + body).split(b"\n")
        return await self._told(lines)

    async def finish(self) -> bytes:
        """What may still leave, and the stream's end."""
        return await self._told([self._rest, b"data: [DONE]"])

    def broken(self, code: str, message: str) -> bytes:
        """The stream's end in an error."""
        self.over = True
        return _data(fault(code, message)) + _END

    async def _told(self, lines: Iterable[bytes]) -> bytes:
        if self.over:
            return b""
        told: list[dict[str, Any]] = []
        try:
            for line in lines:
                if not self.over:
                    told += await self._of_line(line)
        except MALFORMED:
            return b"".join(map(_data, told)) + self.broken(*UNREADABLE)
        return b"".join(map(_data, told)) + (_END if self.over else b"")

    async def _of_line(self, line: bytes) -> list[dict[str, Any]]:
        name, _, value = line.partition(b":")
        if name != b"data":
            return []
        if value.strip() == b"[DONE]":
            self.over = True
            told = await self._held.finish()
        else:
            self._last = _judged_chunk(json.loads(value))
            told = await self._held.add_chunk(self._last, self._last["choices"])
        if self._held.verdict and self._held.is_blocked:
            self.over = True
            told.append(_refused(self._last, sorted(self._held.answers), self._held.verdict))
        return told


async def released(
    completion: dict[str, Any], judge: Callable[[dict[str, Any]], Coroutine[Any, Any, Verdict]]
) -> dict[str, Any]:
    """A whole completion, each choice judged, a refusal in the place of one that is blocked. Raises of `MALFORMED`."""

    async def one(choice: dict[str, Any]) -> dict[str, Any]:
        message = {name: value for name, value in choice["message"].items() if name in _JUDGED}
        verdict = await judge(answer_of(message))
        if verdict.action == "allow":
            kept = {name: value for name, value in choice.items() if name in ("index", "finish_reason", "logprobs")}
            return {**kept, "message": message}
        refusal = {"role": "assistant", "content": None, "refusal": blocked_reason(verdict)}
        return {"index": choice.get("index", 0), "message": refusal, "finish_reason": FILTERED}

    return {**_known(completion), "choices": await all_of(map(one, completion["choices"]))}


async def all_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first fault ends the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _judged_chunk(chunk: dict[str, Any]) -> dict[str, Any]:
    """Only what is judged; token log-probabilities would tell the text by another way."""
    choices = [
        {
            "index": choice.get("index", 0),
            "delta": {name: value for name, value in (choice.get("delta") or {}).items() if name in _JUDGED},
            "finish_reason": choice.get("finish_reason"),
        }
        for choice in chunk.get("choices") or ()
    ]
    return {**_known(chunk), "choices": choices}


def _known(told: dict[str, Any]) -> dict[str, Any]:
    return {name: told[name] for name in _BESIDE_CHOICES if name in told}


def _refused(chunk: dict[str, Any], indices: Iterable[int], verdict: Verdict) -> dict[str, Any]:
    delta = {"refusal": blocked_reason(verdict)}
    choices = [{"index": index, "delta": delta, "finish_reason": FILTERED} for index in indices]
    return {**chunk, "usage": None, "choices": choices}


def _data(event: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()
