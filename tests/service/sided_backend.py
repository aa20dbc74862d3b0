"""A backend that judges request and response separately: BAD makes its own target harmful, BROKEN cannot be judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.service.backend import EngineLoad
from guardreasoner_vl.types import Judgement, Label, ModelInfo, Verdict

if TYPE_CHECKING:
    from guardreasoner_vl.engines.base import StreamListener
    from guardreasoner_vl.types import Exchange, Mode


class SidedBackend:
    """Needs no model, but decodes images; `judged` counts the exchanges whose images could be decoded."""

    def __init__(self) -> None:
        self.policy, self.model, self.is_up = Policy(), ModelInfo(name="sided"), True
        self.load = EngineLoad()
        self.judged = 0

    async def start(self) -> None:
        pass

    async def judge(self, exchange: Exchange, mode: Mode | None, listener: StreamListener | None) -> Verdict:
        checked_exchange(exchange, self.policy.images)
        self.judged += 1
        texts = (exchange.prompt or "", exchange.response or "")
        if any("BROKEN" in text for text in texts):
            raise EngineError("the engine is out of order; try again")
        present = (exchange.has_prompt, exchange.has_response)
        labels = [
            Label.NOT_APPLICABLE if not is_present else Label.HARMFUL if "BAD" in text else Label.UNHARMFUL
            for text, is_present in zip(texts, present, strict=True)
        ]
        flagged = Label.HARMFUL in labels
        return Verdict(
            request=Judgement(label=labels[0]),
            response=Judgement(label=labels[1]),
            flagged=flagged,
            action="block" if flagged else "allow",
            mode="slow",
            model=self.model,
        )

    async def close(self) -> None:
        pass
