"""Validation during GRPO: judge rows with the current model through the production `Guard`, in slow mode."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING

from guardreasoner_vl.engines.faults import is_engine_fault
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.evaluation.metrics import Counts, count
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.training.grpo.log import Validation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.engines.base import Engine
    from guardreasoner_vl.training.grpo.ranks import DistributedContext
    from guardreasoner_vl.types import Sample


def validate(samples: Sequence[Sample], engine: Engine, limit: int, ranks: DistributedContext) -> Validation:
    """F1 over all known labels, coverage, and mean tokens; every rank judges its part.

    `limit` is the most tokens of an answer. Raises `EngineError` if the engine failed a row.
    """
    guard = Guard(engine, Policy(max_new_tokens=limit, retry_new_tokens=limit))
    part = ranks.part(samples)
    verdicts = list(guard.moderate_batch([sample.exchange() for sample in part]))
    with ranks.all_or_none():  # an engine fault is no verdict of the model
        errors = (verdict.error for verdict in verdicts if verdict.error)
        if fault := next((error for error in errors if is_engine_fault(error.code)), None):
            raise EngineError(
                f"validation failed ({fault.message}): run the same command to resume from the last checkpoint"
            )
    rank_counts = count(
        (gold, judged.label)
        for sample, verdict in zip(part, verdicts, strict=True)
        for gold, judged in ((sample.request_label, verdict.request), (sample.response_label, verdict.response))
        if gold is not None
    )
    tokens = sum(verdict.usage.completion_tokens for verdict in verdicts)
    *cells, tokens_of_all = ranks.sum([*astuple(rank_counts), tokens])
    counts = Counts(*map(int, cells))
    return Validation(f1=counts.f1 or 0.0, coverage=counts.coverage, tokens=tokens_of_all / len(samples))
