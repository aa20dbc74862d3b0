"""Apply the operator's settings to a verdict; request and response are enforced independently.

An exchange is blocked if its request is harmful and requests are enforced, or its response is harmful and responses are
enforced. An exchange that could not be judged is blocked if a target that it holds is enforced with `on_error: block`,
or if its author may have caused the error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.judging.policy import action_on_error
from guardreasoner_vl.types import Label

if TYPE_CHECKING:
    from collections.abc import Collection

    from guardreasoner_vl.service.config import ServiceConfig
    from guardreasoner_vl.types import Exchange, Target, Verdict


def present_targets(exchange: Exchange) -> tuple[Target, ...]:
    """The targets that the exchange holds."""
    present = {"request": exchange.has_prompt, "response": exchange.has_response}
    return tuple(target for target in TARGETS if present[target])


def enforced_verdict(verdict: Verdict, targets: Collection[Target], config: ServiceConfig) -> Verdict:
    """The verdict with the operator's action; an error is attributed to those of `targets` that are not harmful.

    `on_error: allow` holds for faults of the guard only (`judging.policy.action_on_error`).
    """
    labels = {"request": verdict.request.label, "response": verdict.response.label}
    harmful = [target for target in TARGETS if labels[target] is Label.HARMFUL]
    unjudged = [] if verdict.error is None else [target for target in targets if target not in harmful]
    code = verdict.error.code if verdict.error else ""
    failing = harmful + [
        target for target in unjudged if action_on_error(code, config.enforcement(target).on_error) == "block"
    ]
    blocks = any(config.enforcement(target).mode == "enforce" for target in failing)
    return verdict.model_copy(update={"action": "block" if blocks else "allow"})
