"""Server-sent events of the guard's own API.

reasoning   the next text of the guard's reasoning        restart   the reasoning so far is void; the guard starts again
release     text of the model's answer that was allowed   verdict   the verdict, always the last event
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from guardreasoner_vl.types import Verdict

_OPEN, _CLOSE = "<think>", "</think>"


def event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event. JSON contains no line break, so the content cannot forge another event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def verdict_event(verdict: Verdict) -> bytes:
    """The `verdict` event."""
    return event("verdict", verdict.model_dump(mode="json"))


class ReasoningExtractor:
    """Extracts the text inside `<think>` from a streamed answer; a tag may be split across chunks."""

    def __init__(self) -> None:
        self._pending, self._inside, self._over = "", False, False

    def add(self, text: str) -> str:
        """The new reasoning text, without a trailing part that may be the start of the closing tag."""
        if self._over:
            return ""
        self._pending += text
        if not self._inside:
            _, opening, self._pending = self._pending.rpartition(_OPEN)
            self._inside = bool(opening)
            if not self._inside:
                return ""
        reasoning, closing, _ = self._pending.partition(_CLOSE)
        if closing:
            self._over = True
            return reasoning
        kept = next((n for n in range(len(_CLOSE) - 1, 0, -1) if self._pending.endswith(_CLOSE[:n])), 0)
        cut = len(self._pending) - kept
        reasoning, self._pending = self._pending[:cut], self._pending[cut:]
        return reasoning


@dataclass
class QueueListener:
    """A `StreamListener` that queues server-sent events. Use it on one event loop only."""

    events: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    _reasoning: ReasoningExtractor = field(default_factory=ReasoningExtractor)
    _has_sent: bool = False

    def on_start(self) -> None:
        """Begin an answer; queues `restart` if reasoning of an earlier attempt was sent."""
        self._reasoning = ReasoningExtractor()
        if self._has_sent:
            self.events.put_nowait(event("restart", {}))
        self._has_sent = False

    def on_text(self, text: str) -> None:
        """Queue the text that belongs to the reasoning."""
        if piece := self._reasoning.add(text):
            self._has_sent = True
            self.events.put_nowait(event("reasoning", {"text": piece}))


async def event_stream(
    listener: QueueListener, judging: Awaitable[Verdict], last: Callable[[Verdict], bytes]
) -> AsyncIterator[bytes]:
    """Yield the listener's events, then `last` of the verdict; closing the generator cancels the judgement."""
    task = asyncio.ensure_future(judging)
    waiting = asyncio.ensure_future(listener.events.get())
    try:
        while True:
            await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                break
            yield waiting.result()
            waiting = asyncio.ensure_future(listener.events.get())
        yield last(await task)
    finally:
        listener.cancelled = True
        for work in (task, waiting):
            work.cancel()
