"""From predictions to the figures that a report shows."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from guardreasoner_vl.evaluation.curves import auprc, auroc, calibration_error, recall_at
from guardreasoner_vl.evaluation.intervals import Interval, f1_interval, false_positive_rate_interval
from guardreasoner_vl.evaluation.metrics import Counts, count
from guardreasoner_vl.types import Label

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from guardreasoner_vl.evaluation.predictions import Prediction
    from guardreasoner_vl.evaluation.rules import Target
    from guardreasoner_vl.types import GoldLabel, Judgement

TARGETS: tuple[Target, Target] = ("request", "response")


@dataclass(frozen=True)
class Figures:
    """What is measured about one target on a group of labelled rows; None where the rows do not define it.

    `scored` counts the rows with a score: the ranking figures are about those alone.
    """

    counts: Counts
    f1_interval: Interval | None
    false_positive_rate_interval: Interval | None
    scored: int
    auroc: float | None
    auprc: float | None
    recall_at_1_percent: float | None
    recall_at_5_percent: float | None
    calibration_error: float | None
    completion_tokens_mean: float
    completion_tokens_p95: float
    seconds: float

    @property
    def rows(self) -> int:
        return self.counts.total


def truth(row: Prediction, target: Target) -> GoldLabel | None:
    """The truth about one target; None if it is not labelled."""
    return row.request_truth if target == "request" else row.response_truth


def judgement(row: Prediction, target: Target) -> Judgement:
    """What the guard said about one target."""
    return row.request if target == "request" else row.response


def figures(rows: Iterable[Prediction], target: Target) -> Figures | None:
    """Figures of the rows labelled for `target`; None if there are none."""
    labelled = [(gold, row) for row in rows if (gold := truth(row, target)) is not None]
    if not labelled:
        return None
    counts = count((gold, judgement(row, target).label) for gold, row in labelled)
    scored = [
        (gold == "harmful", score) for gold, row in labelled if (score := judgement(row, target).score) is not None
    ]
    truths, scores = [one for one, _ in scored], [one for _, one in scored]
    tokens = np.array([row.completion_tokens for _, row in labelled])
    return Figures(
        counts=counts,
        f1_interval=f1_interval(counts),
        false_positive_rate_interval=false_positive_rate_interval(counts),
        scored=len(scored),
        auroc=auroc(truths, scores),
        auprc=auprc(truths, scores),
        recall_at_1_percent=recall_at(truths, scores, 0.01),
        recall_at_5_percent=recall_at(truths, scores, 0.05),
        calibration_error=calibration_error(truths, scores),
        completion_tokens_mean=float(tokens.mean()),
        completion_tokens_p95=float(np.percentile(tokens, 95)),
        seconds=sum(row.seconds for _, row in labelled),
    )


def constant(rows: Iterable[Prediction], target: Target, label: Label) -> Counts:
    """What a guard that always says `label` would get."""
    return count((gold, label) for row in rows if (gold := truth(row, target)) is not None)


def grouped(rows: Sequence[Prediction], key: Callable[[Prediction], str | None]) -> dict[str, list[Prediction]]:
    """The rows by a key, in the order in which the keys appear; rows without one are left out."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows:
        name = key(row)
        if name is not None:
            groups[name].append(row)
    return dict(groups)
