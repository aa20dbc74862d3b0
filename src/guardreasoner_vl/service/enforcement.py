"""Turns a verdict and the operator's settings into an action; request and response are enforced independently.

An exchange is blocked if its request is harmful and requests are enforced, or its response is harmful and responses are
enforced. An exchange that could not be judged is blocked if a part that it has is enforced with `on_error: block`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.service.config import STAGES
from guardreasoner_vl.types import Label

if TYPE_CHECKING:
    from collections.abc import Collection

    from guardreasoner_vl.service.config import ServiceConfig, Stage
    from guardreasoner_vl.types import Exchange, Verdict


def stages_of(exchange: Exchange) -> tuple[Stage, ...]:
    """The parts of an exchange that can be judged."""
    present = {"request": exchange.has_prompt, "response": exchange.has_response}
    return tuple(stage for stage in STAGES if present[stage])


def enforced(verdict: Verdict, stages: Collection[Stage], config: ServiceConfig) -> Verdict:
    """The verdict with the operator's action; an error counts for those of `stages` that are not harmful anyway."""
    labels = {"request": verdict.request.label, "response": verdict.response.label}
    harmful = [stage for stage in STAGES if labels[stage] is Label.HARMFUL]
    unjudged = [] if verdict.error is None else [stage for stage in stages if stage not in harmful]
    failing = harmful + [stage for stage in unjudged if config.stage(stage).on_error == "block"]
    blocks = any(config.stage(stage).use == "enforce" for stage in failing)
    return verdict.model_copy(update={"action": "block" if blocks else "allow"})
