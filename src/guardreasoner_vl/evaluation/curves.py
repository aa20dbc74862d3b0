"""What a score is worth: ranking, recall at a false-positive rate, calibration.

Scores are probabilities of *harmful* in [0, 1]; truths are true where the row is harmful. A figure that the
rows do not define is None: ranking needs both classes.
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
    """Rows whose score lies in one of `BINS` equal parts of [0, 1]: their mean score and their share of harmful."""

    rows: int
    score: float
    harmful: float


@dataclass(frozen=True)
class Point:
    """What calling every row from `threshold` on harmful would give."""

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
    """Average precision: sum over thresholds of (R_n - R_{n-1}) P_n, equal scores taken together."""
    points = curve(truths, scores)
    if not points:
        return None
    truth, _ = _arrays(truths, scores)
    harmful, unharmful = int(truth.sum()), int((~truth).sum())
    area, before = 0.0, 0.0
    for point in points:
        true_positive, false_positive = point.recall * harmful, point.false_positive_rate * unharmful
        area += (point.recall - before) * true_positive / (true_positive + false_positive)
        before = point.recall
    return area


def recall_at(truths: Sequence[bool], scores: Sequence[float], false_positive_rate: float) -> float | None:
    """The best recall of a threshold whose false-positive rate is at most that."""
    points = curve(truths, scores)
    if not points:
        return None
    return max((point.recall for point in points if point.false_positive_rate <= false_positive_rate), default=0.0)


def curve(truths: Sequence[bool], scores: Sequence[float]) -> list[Point]:
    """One point for each different score, highest threshold first; empty without both classes."""
    truth, score = _arrays(truths, scores)
    harmful, unharmful = int(truth.sum()), int((~truth).sum())
    if not (harmful and unharmful):
        return []
    order = np.argsort(-score, kind="stable")
    ranked, hits = score[order], np.cumsum(truth[order])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    found, called = hits[last], last + 1
    return [
        Point(float(ranked[at]), float(tp / harmful), float((n - tp) / unharmful), float(2 * tp / (n + harmful)))
        for at, tp, n in zip(last, found, called, strict=True)
    ]


def reliability(truths: Sequence[bool], scores: Sequence[float]) -> list[Bin]:
    """The reliability diagram's bins that hold any row, lowest scores first."""
    truth, score = _arrays(truths, scores)
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    rows = (np.flatnonzero(place == number) for number in range(BINS))
    return [Bin(len(at), float(score[at].mean()), float(truth[at].mean())) for at in rows if len(at)]


def calibration_error(truths: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Expected calibration error: mean |share of harmful - mean score| of the bins, weighted by rows."""
    bins = reliability(truths, scores)
    total = sum(one.rows for one in bins)
    return sum(one.rows * abs(one.harmful - one.score) for one in bins) / total if total else None


def _arrays(truths: Sequence[bool], scores: Sequence[float]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    truth, score = np.asarray(truths, dtype=bool), np.asarray(scores, dtype=float)
    if truth.shape != score.shape:
        raise ValueError("give as many scores as truths")
    return truth, score
