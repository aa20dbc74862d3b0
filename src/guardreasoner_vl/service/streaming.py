"""Server-sent events of the guard: its reasoning as it comes, or the pieces of an answer that it releases.

reasoning   one piece of the guard's reasoning          restart   what was told is void, the guard begins again
release     a piece of the model's answer that may go   verdict   the verdict, always the last event
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
    """One server-sent event; JSON holds no line end, so the content cannot forge another event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def verdict_event(verdict: Verdict) -> bytes:
    """The last event."""
    return event("verdict", verdict.model_dump(mode="json"))


class Reasoning:
    """Picks the reasoning out of an answer that comes in pieces; a tag may be cut anywhere."""

    def __init__(self) -> None:
        self._held, self._inside, self._over = "", False, False

    def add(self, text: str) -> str:
        """What of the reasoning is certain now."""
        if self._over:
            return ""
        self._held += text
        if not self._inside:
            _, opened, self._held = self._held.rpartition(_OPEN)
            self._inside = bool(opened)
            if not self._inside:
                return ""
        told, closed, _ = self._held.partition(_CLOSE)
        if closed:
            self._over = True
            return told
        kept = next((n for n in range(len(_CLOSE) - 1, 0, -1) if self._held.endswith(_CLOSE[:n])), 0)
        told, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return told


@dataclass
class QueueWatch:
    """An engine's watch whose events wait in a queue. Belongs to one event loop."""

    events: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    called_off: bool = False
    _reasoning: Reasoning = field(default_factory=Reasoning)
    _told: bool = False

    def begin(self) -> None:
        self._reasoning = Reasoning()
        if self._told:
            self.events.put_nowait(event("restart", {}))
        self._told = False

    def tell(self, text: str) -> None:
        if piece := self._reasoning.add(text):
            self._told = True
            self.events.put_nowait(event("reasoning", {"text": piece}))


async def told(
    watch: QueueWatch, judging: Awaitable[Verdict], last: Callable[[Verdict], bytes]
) -> AsyncIterator[bytes]:
    """The watch's events as they come, then the verdict's; who stops listening calls the judgement off."""
    task = asyncio.ensure_future(judging)
    waiting = asyncio.ensure_future(watch.events.get())
    try:
        while True:
            await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                break
            yield waiting.result()
            waiting = asyncio.ensure_future(watch.events.get())
        yield last(await task)
    finally:
        watch.called_off = True
        for work in (task, waiting):
            work.cancel()
