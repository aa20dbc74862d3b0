"""Compute the figures of a report from predictions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.evaluation.curves import auprc, auroc, calibration_error, recall_at
from guardreasoner_vl.evaluation.intervals import Interval, f1_interval, false_positive_rate_interval
from guardreasoner_vl.evaluation.metrics import Counts, count
from guardreasoner_vl.evaluation.predictions import Prediction
from guardreasoner_vl.types import Label, Target

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from guardreasoner_vl.types import GoldLabel, Judgement

Baseline: TypeAlias = Callable[[Prediction, Target], Label]
"""A constant or precomputed baseline: maps a labelled (prediction, target) to a label."""

ALL = "all"
MODALITY = "modality: "
CATEGORY = "category: "


@dataclass(frozen=True)
class Figures:
    """The figures of one target on a group of labelled rows; None if the rows do not define a figure.

    `scored` counts the rows with a score; ranking figures use only these. `seconds` is the sum over rows.
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
        """Number of labelled rows."""
        return self.counts.total


@dataclass(frozen=True)
class Settings:
    """The settings that all predictions of one folder share."""

    model: str
    revision: str | None
    mode: str
    guard: dict[str, Any] = field(default_factory=dict)
    """Other settings that affect verdicts: thresholds, calibration, limits, or the adapter."""


@dataclass(frozen=True)
class GroupResults:
    """The guard's figures on a group of rows, and the baselines' confusion tables."""

    figures: Figures
    baselines: dict[str, Counts]


@dataclass
class Results:
    """Figures by target and group: all rows, each benchmark, each modality, each category.

    Benchmarks named in `excluded` count in their own group only.
    """

    settings: Settings
    groups: dict[Target, dict[str, GroupResults]] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    unanswered: int = 0
    """Rows for which the engine failed: they count as errors until the same command asks again."""

    def as_json(self) -> dict[str, Any]:
        """Plain data for `results.json`, with the rates computed from the counts."""
        content = asdict(self)
        for target, groups in self.groups.items():
            for name, group in groups.items():
                counts = group.figures.counts
                content["groups"][target][name]["figures"] |= {rate: getattr(counts, rate) for rate in RATES}
        return content


RATES = ("f1", "precision", "recall", "false_positive_rate", "accuracy", "coverage")
CONSTANT: Mapping[str, Baseline] = {
    "always harmful": lambda row, target: Label.HARMFUL,  # noqa: ARG005
    "always unharmful": lambda row, target: Label.UNHARMFUL,  # noqa: ARG005
}


def summarise(
    rows: Sequence[Prediction],
    settings: Settings,
    baselines: Mapping[str, Baseline] = CONSTANT,
    excluded: Sequence[str] = (),
) -> Results:
    """Figures of all rows, each benchmark, modality and category; `excluded` benchmarks have only their own."""
    results = Results(settings, excluded=tuple(excluded))
    benchmarks = group_rows(rows, lambda row: row.benchmark)
    pooled = [row for row in rows if row.benchmark not in excluded]
    groups = {
        ALL: pooled,
        **benchmarks,
        **{f"{MODALITY}{name}": part for name, part in group_rows(pooled, lambda row: row.modality).items()},
        **{f"{CATEGORY}{name}": part for name, part in group_rows(pooled, lambda row: row.category).items()},
    }
    for target in TARGETS:
        results.groups[target] = {
            name: GroupResults(
                measured, {key: _baseline_counts(part, target, guard) for key, guard in baselines.items()}
            )
            for name, part in groups.items()
            if (measured := figures(part, target)) is not None
        }
    return results


def check_excluded(excluded: Iterable[str], benchmarks: Sequence[str]) -> None:
    """Raises `InputError` for a name that no benchmark has."""
    if unknown := set(excluded) - set(benchmarks):
        raise InputError(
            f"no benchmark named {', '.join(sorted(unknown))} to exclude from the total; use {', '.join(benchmarks)}"
        )


def _baseline_counts(rows: Iterable[Prediction], target: Target, guard: Baseline) -> Counts:
    return count((gold, guard(row, target)) for row in rows if (gold := truth(row, target)) is not None)


def truth(row: Prediction, target: Target) -> GoldLabel | None:
    """The true label of one target; None if it is not labelled."""
    return row.request_truth if target == "request" else row.response_truth


def judgement(row: Prediction, target: Target) -> Judgement:
    """The guard's judgement of one target."""
    return row.request if target == "request" else row.response


def figures(rows: Iterable[Prediction], target: Target) -> Figures | None:
    """The figures of the rows labelled for `target`; None without such rows."""
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


def group_rows(rows: Sequence[Prediction], key: Callable[[Prediction], str | None]) -> dict[str, list[Prediction]]:
    """Group rows by a key, in order of appearance; rows whose key is None are left out."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows:
        name = key(row)
        if name is not None:
            groups[name].append(row)
    return dict(groups)
