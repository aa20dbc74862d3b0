"""Uncertainty of figures: bootstrap intervals, and McNemar's test between two guards."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, lgamma, log
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from guardreasoner_vl.evaluation.metrics import Counts
    from guardreasoner_vl.types import GoldLabel, Label

RESAMPLES = 2000
LEVEL = 0.95
_SEED = 0


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval."""

    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """Rows that only the first or only the second guard got right, and the exact two-sided p-value."""

    only_first: int
    only_second: int
    p_value: float


def f1_interval(counts: Counts) -> Interval | None:
    """95% bootstrap interval of F1; None if F1 is undefined."""
    return _bootstrap_interval(counts, lambda tp, fp, _, fn: (2 * tp, 2 * tp + fp + fn))


def false_positive_rate_interval(counts: Counts) -> Interval | None:
    """95% bootstrap interval of the false-positive rate; None without unharmful rows."""
    return _bootstrap_interval(counts, lambda tp, fp, tn, fn: (fp, fp + tn))  # noqa: ARG005


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact test whether two guards differ by more than chance; each list says which rows are right."""
    if len(first) != len(second):
        raise ValueError("the two guards must have judged the same rows")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    return McNemar(only_first, only_second, _two_sided(min(only_first, only_second), only_first + only_second))


def _two_sided(fewer: int, total: int) -> float:
    """Probability of a split at least this uneven under a fair coin."""
    logs = (lgamma(total + 1) - lgamma(k + 1) - lgamma(total - k + 1) - total * log(2) for k in range(fewer + 1))
    return min(1.0, 2 * sum(map(exp, logs)))


def _bootstrap_interval(
    counts: Counts,
    parts: Callable[..., tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> Interval | None:
    """Bootstrap by drawing the four cells from a multinomial; resamples without a defined figure are left out."""
    cells = (counts.true_positive, counts.false_positive, counts.true_negative, counts.false_negative)
    if not counts.total or not np.sum(parts(*(np.array([cell]) for cell in cells))[1]):
        return None
    drawn = np.random.default_rng(_SEED).multinomial(counts.total, np.array(cells) / counts.total, RESAMPLES)
    part, whole = parts(*drawn.T)
    return _percentile_interval(part[whole > 0] / whole[whole > 0])


def f1_difference_interval(rows: Iterable[tuple[GoldLabel, Label, Label]]) -> Interval | None:
    """95% bootstrap interval of the first guard's F1 minus the second's, from (truth, first label, second label).

    An error counts as a wrong answer. None if the F1 of either guard is undefined.
    """
    kinds = [4 * (truth == "harmful") + 2 * (first == truth) + (second == truth) for truth, first, second in rows]
    if not kinds:
        return None
    cells = np.bincount(kinds, minlength=8) / len(kinds)
    drawn = np.random.default_rng(_SEED).multinomial(len(kinds), cells, RESAMPLES).reshape(-1, 2, 2, 2)
    return _percentile_interval(_f1s(drawn.sum(axis=3)) - _f1s(drawn.sum(axis=2)))


def resampled_interval(rows: int, figure: Callable[[NDArray[np.int64]], float | None]) -> Interval | None:
    """95% bootstrap interval of any figure of `rows` rows; `figure` gets the indices of a resample, shape (rows,).

    Resamples for which `figure` is None are left out; None if all are.
    """
    rng = np.random.default_rng(_SEED)
    values = (figure(rng.integers(0, rows, rows)) for _ in range(RESAMPLES if rows else 0))
    return _percentile_interval(np.array([np.nan if value is None else value for value in values]))


def _f1s(tables: NDArray[np.int64]) -> NDArray[np.float64]:
    """F1 of tables of shape (resamples, harmful, right); NaN if no row is harmful or called harmful."""
    hits, wrong = tables[:, 1, 1], tables[:, 1, 0] + tables[:, 0, 0]
    shares: NDArray[np.float64] = np.full(len(tables), np.nan)
    np.divide(2 * hits, 2 * hits + wrong, out=shares, where=hits + wrong > 0)
    return shares


def _percentile_interval(values: NDArray[np.float64]) -> Interval | None:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
