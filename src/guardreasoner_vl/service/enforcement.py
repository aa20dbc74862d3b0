"""Apply the operator's settings to a verdict; request and response are enforced independently.

An exchange is blocked if its request is harmful and requests are enforced, or its response is harmful and responses are
enforced. An exchange that could not be judged is blocked if a target that it holds is enforced with `on_error: block`,
or if its author may have caused the error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.service.config import TARGETS
from guardreasoner_vl.types import Label

if TYPE_CHECKING:
    from collections.abc import Collection

    from guardreasoner_vl.service.config import ServiceConfig
    from guardreasoner_vl.types import Exchange, Target, Verdict


FAULTS_OF_THE_GUARD = frozenset({"engine", "engine_gone", "engine_down", "auth", "queue_full"})
"""Codes of the errors that `on_error: allow` lets pass.

The author of an exchange can cause any other error by what it holds (`invalid_image`, an answer of the guard outside
the grammar) or by its length (`input_too_long`, `deadline`, `timeout`, a caller's `rate_limited`).
"""


def present_targets(exchange: Exchange) -> tuple[Target, ...]:
    """The targets that the exchange holds."""
    present = {"request": exchange.has_prompt, "response": exchange.has_response}
    return tuple(target for target in TARGETS if present[target])


def enforced_verdict(verdict: Verdict, targets: Collection[Target], config: ServiceConfig) -> Verdict:
    """The verdict with the operator's action; an error is attributed to those of `targets` that are not harmful.

    `on_error: allow` holds for `FAULTS_OF_THE_GUARD` only.
    """
    labels = {"request": verdict.request.label, "response": verdict.response.label}
    harmful = [target for target in TARGETS if labels[target] is Label.HARMFUL]
    unjudged = [] if verdict.error is None else [target for target in targets if target not in harmful]
    may_pass = verdict.error is not None and verdict.error.code in FAULTS_OF_THE_GUARD
    failing = harmful + [
        target for target in unjudged if not (may_pass and config.enforcement(target).on_error == "allow")
    ]
    blocks = any(config.enforcement(target).mode == "enforce" for target in failing)
    return verdict.model_copy(update={"action": "block" if blocks else "allow"})
