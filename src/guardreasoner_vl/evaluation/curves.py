"""Quality of scores: ranking, recall at a false-positive rate, calibration.

Scores are probabilities of *harmful* in [0, 1]; truths are True for harmful rows. A figure is None if the rows do not
define it: ranking needs both classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

BINS = 10


@dataclass(frozen=True)
class Bin:
    """The rows in one of `BINS` equal parts of [0, 1]: their number, mean score and share of harmful rows."""

    rows: int
    score: float
    harmful: float


@dataclass(frozen=True)
class Point:
    """The rates when every row with a score of at least `threshold` is called harmful."""

    threshold: float
    recall: float
    false_positive_rate: float
    f1: float


def auroc(truths: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Probability that a harmful row scores above an unharmful one; ties count half."""
    truth, score = _arrays(truths, scores)
    harmful, unharmful = int(truth.sum()), int((~truth).sum())
    if not (harmful and unharmful):
        return None
    order = np.argsort(score, kind="stable")
    _, first, counts = np.unique(score[order], return_index=True, return_counts=True)
    ranks = np.repeat(first + (counts + 1) / 2, counts)
    return float((ranks[truth[order]].sum() - harmful * (harmful + 1) / 2) / (harmful * unharmful))


def auprc(truths: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Average precision: sum over thresholds of (R_n - R_{n-1}) P_n; equal scores are one threshold."""
    hits, called, harmful, unharmful, _ = _cumulative_counts(truths, scores)
    if not (harmful and unharmful):
        return None
    return float((np.diff(hits, prepend=0) / harmful * hits / called).sum())


def recall_at(truths: Sequence[bool], scores: Sequence[float], false_positive_rate: float) -> float | None:
    """The best recall of any threshold with at most this false-positive rate."""
    hits, called, harmful, unharmful, _ = _cumulative_counts(truths, scores)
    if not (harmful and unharmful):
        return None
    allowed = hits[(called - hits) / unharmful <= false_positive_rate]
    return float(allowed.max(initial=0) / harmful)


def curve(truths: Sequence[bool], scores: Sequence[float]) -> list[Point]:
    """One point per distinct score, highest threshold first; empty without both classes."""
    hits, called, harmful, unharmful, thresholds = _cumulative_counts(truths, scores)
    if not (harmful and unharmful):
        return []
    return [
        Point(float(threshold), float(tp / harmful), float((n - tp) / unharmful), float(2 * tp / (n + harmful)))
        for threshold, tp, n in zip(thresholds, hits, called, strict=True)
    ]


def reliability(truths: Sequence[bool], scores: Sequence[float]) -> list[Bin]:
    """The non-empty bins of the reliability diagram, lowest scores first."""
    truth, score = _arrays(truths, scores)
    bin_of = np.minimum((score * BINS).astype(int), BINS - 1)
    rows = (np.flatnonzero(bin_of == number) for number in range(BINS))
    return [Bin(len(at), float(score[at].mean()), float(truth[at].mean())) for at in rows if len(at)]


def calibration_error(truths: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Expected calibration error: mean of |share of harmful rows - mean score| over bins, weighted by rows."""
    bins = reliability(truths, scores)
    total = sum(one.rows for one in bins)
    return sum(one.rows * abs(one.harmful - one.score) for one in bins) / total if total else None


def _cumulative_counts(
    truths: Sequence[bool], scores: Sequence[float]
) -> tuple[NDArray[np.int64], NDArray[np.int64], int, int, NDArray[np.float64]]:
    """Cumulative counts by distinct score, highest first.

    Gives harmful rows and all rows at or above each score, the totals of both classes, and the scores; arrays have the
    shape (distinct scores,).
    """
    truth, score = _arrays(truths, scores)
    order = np.argsort(-score, kind="stable")
    ranked, hits = score[order], np.cumsum(truth[order], dtype=np.int64)
    ends = np.append(ranked[1:] != ranked[:-1], True) if len(ranked) else np.zeros(0, dtype=bool)
    last = np.flatnonzero(ends).astype(np.int64)
    return hits[last], last + 1, int(truth.sum()), int((~truth).sum()), ranked[last]


def _arrays(truths: Sequence[bool], scores: Sequence[float]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    truth, score = np.asarray(truths, dtype=bool), np.asarray(scores, dtype=float)
    if truth.shape != score.shape:
        raise ValueError("give as many scores as truths")
    return truth, score
