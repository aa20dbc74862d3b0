"""A backend without a model: BAD is harmful, BROKEN cannot be judged, the reasoning is streamed word by word."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from guardreasoner_vl.guard import GuardRequest
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.service.backend import EngineLoad
from guardreasoner_vl.service.moderation import PROBE
from guardreasoner_vl.service.process import EngineGoneError
from guardreasoner_vl.types import ModelInfo
from tests.scripted_guard import scripted_guard

if TYPE_CHECKING:
    from guardreasoner_vl.engines.base import StreamListener
    from guardreasoner_vl.types import Exchange, Mode, Verdict


class ScriptedBackend:
    """`pause` is in seconds for each exchange; `judged` holds what was judged, readiness's own probe left out,
    and `cancelled` what was given up."""

    def __init__(self, pause: float = 0.0, reasoning: str = "Looked at it.", name: str = "scripted") -> None:
        self.policy = Policy()
        self.model = ModelInfo(name=name, revision="r1")
        self.is_up = True
        self.load = EngineLoad()
        self.gone = False
        self.judged: list[Exchange] = []
        self.cancelled: list[Exchange] = []
        self._pause, self._reasoning = pause, reasoning
        self._guard = scripted_guard(self.policy, reasoning=reasoning)

    async def start(self) -> None:
        pass

    async def judge(self, exchange: Exchange, mode: Mode | None, listener: StreamListener | None) -> Verdict:
        if exchange is not PROBE:
            self.judged.append(exchange)
        try:
            await self._reason(listener)
        except asyncio.CancelledError:
            self.cancelled.append(exchange)
            raise
        if self.gone:
            raise EngineGoneError
        verdict = await self._guard.amoderate_each(GuardRequest(exchange, mode))
        return verdict.model_copy(update={"model": self.model})

    async def close(self) -> None:
        pass

    async def _reason(self, listener: StreamListener | None) -> None:
        """Wait for the pause while streaming the reasoning."""
        words = [f"{word} " for word in self._reasoning.split()]
        if listener:
            listener.on_start()
            listener.on_text("<think>\n")
        for word in words:
            await asyncio.sleep(self._pause / len(words))
            if listener:
                listener.on_text(word)
        if listener:
            listener.on_text("</think>\n<result>")
