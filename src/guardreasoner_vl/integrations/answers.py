"""A model's answers in OpenAI's shape: what of them is judged, and how a streamed one is held back until it was."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from guardreasoner_vl.types import Verdict

T = TypeVar("T")
JUDGED = ("role", "content", "reasoning_content", "refusal", "tool_calls", "function_call")
"""The fields of a message or of a delta that are judged."""
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
class HeldAnswers(Generic[T]):
    """Chunks of a streamed answer on their way out: none leaves before the answer up to it was judged.

    `judge` is asked about each answer, whole so far, once `window` new characters have come; from the first tool call
    on only at the end, since half a call cannot be judged. If one answer is refused, nothing leaves any more.
    """

    judge: Callable[[dict[str, Any]], Awaitable[Verdict]]
    window: int = 400
    refused: Verdict | None = None
    answers: dict[int, _Answer] = field(default_factory=dict)
    _held: list[T] = field(default_factory=list)
    _new: int = 0

    async def add(self, chunk: T, choices: Iterable[Mapping[str, Any]]) -> list[T]:
        """What may leave now that `chunk`, with its choices, has come. Raises `ValueError` for what is no choice."""
        self._held.append(chunk)
        for choice in choices:
            answer = self.answers.setdefault(choice.get("index") or 0, _Answer())
            self._new += answer.add(choice.get("delta") or {})
        calling = any(answer.calls for answer in self.answers.values())
        return [] if calling or self._new < self.window else await self.finish()

    async def finish(self) -> list[T]:
        """What may leave without waiting for more."""
        if self._new:
            verdicts = await asyncio.gather(*(self.judge(answer.judged) for answer in self.answers.values()))
            self.refused = self.refused or next((one for one in verdicts if one.action == "block"), None)
            self._new = 0
        released, self._held = ([] if self.refused else self._held), []
        return released
