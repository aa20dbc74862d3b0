"""From a guard's predictions on labelled rows to its calibration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from guardreasoner_vl.calibration import PRESETS, Calibration, Measured, ModeScales, Scale
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.curves import calibration_error, curve
from guardreasoner_vl.evaluation.results import TARGETS, judgement, truth

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from guardreasoner_vl.calibration import Preset
    from guardreasoner_vl.evaluation.predictions import Prediction
    from guardreasoner_vl.types import ModelInfo, Target

EDGE = 1e-6
"""Scores closer than this to 0 or 1 are taken as that close, so that one certain mistake does not decide alone."""

SMALLEST, LARGEST = 0.05, 20.0
FEWEST = 20
"""Rows of each class that a scale is fitted to at least."""

_STEPS = 80
_GOLDEN = (math.sqrt(5) - 1) / 2


def fit(
    fast: Sequence[Prediction],
    slow: Sequence[Prediction],
    model: ModelInfo,
    data: str,
    reasoned: float = 0.3,
    targets: Mapping[Preset, float] = PRESETS,
) -> Calibration:
    """`reasoned` is the share of rows that `hybrid` mode shall reason about; `targets` are false-positive rates.

    Raises `DataError` if no target has at least `FEWEST` scored rows of both classes.
    """
    modes = [_mode(rows, targets) for rows in (fast, slow)]
    if not any(scale.measured for mode in modes for scale in (mode.request, mode.response)):
        raise DataError(f"{data}: fewer than {FEWEST} scored rows of each class; give more labelled rows")
    band, share = doubt_band(fast, modes[0], reasoned)
    return Calibration(model=model, data=data, fast=modes[0], slow=modes[1], band=band, reasoned=share)


def fit_temperature(truths: Sequence[bool], scores: Sequence[float]) -> float:
    """The temperature whose scaled scores have the least negative log-likelihood, within [0.05, 20]."""
    logits, signs = _logits(scores), np.where(np.asarray(truths, dtype=bool), 1.0, -1.0)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, -signs * logits / math.exp(log_temperature)).mean())

    low, high = math.log(SMALLEST), math.log(LARGEST)
    for _ in range(_STEPS):  # golden section: the loss is convex in 1 / T, so it has one valley
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def scaled(scores: Sequence[float], temperature: float) -> list[float]:
    """Calibrated scores: the sigmoid of the logits over the temperature."""
    return [float(value) for value in 1 / (1 + np.exp(-_logits(scores) / temperature))]


def threshold_at(truths: Sequence[bool], scores: Sequence[float], false_positive_rate: float) -> float:
    """The lowest score from which on the false-positive rate is at most that; above all scores if none is."""
    allowed = [point.threshold for point in curve(truths, scores) if point.false_positive_rate <= false_positive_rate]
    return min(allowed) if allowed else min(1.0, math.nextafter(max(scores), 2.0))


def doubt_band(fast: Sequence[Prediction], scales: ModeScales, share: float) -> tuple[tuple[float, float], float]:
    """The band around 1/2 that holds about `share` of the rows, and the share that it does hold."""
    distances = np.array([distance for row in fast if (distance := _distance(row, scales)) is not None])
    if not len(distances) or share <= 0:
        return (0.5, 0.5), 0.0
    width = float(np.quantile(distances, min(share, 1.0), method="lower"))
    return (0.5 - width, 0.5 + width), float((distances <= width).mean())


def _distance(row: Prediction, scales: ModeScales) -> float | None:
    """How far the row's more doubtful score is from 1/2."""
    pairs = ((row.request.score, scales.request), (row.response.score, scales.response))
    found = [abs(scaled([score], scale.temperature)[0] - 0.5) for score, scale in pairs if score is not None]
    return min(found, default=None)


def _mode(rows: Sequence[Prediction], targets: Mapping[Preset, float]) -> ModeScales:
    request, response = (_scale(rows, target, targets) for target in TARGETS)
    tokens = float(np.mean([row.completion_tokens for row in rows])) if rows else 0.0
    return ModeScales(request=request, response=response, completion_tokens=tokens)


def _scale(rows: Sequence[Prediction], target: Target, targets: Mapping[Preset, float]) -> Scale:
    """Fitted where there are enough rows of both classes; else the identity."""
    pairs = [
        (gold == "harmful", score)
        for row in rows
        if (gold := truth(row, target)) is not None and (score := judgement(row, target).score) is not None
    ]
    truths, raw = [gold for gold, _ in pairs], [score for _, score in pairs]
    if min(sum(truths), len(truths) - sum(truths)) < FEWEST:
        return Scale()
    temperature = fit_temperature(truths, raw)
    scores = scaled(raw, temperature)
    before, after = calibration_error(truths, raw), calibration_error(truths, scores)
    return Scale(
        temperature=temperature,
        thresholds={preset: threshold_at(truths, scores, rate) for preset, rate in targets.items()},
        measured=Measured(rows=len(pairs), error_before=before or 0.0, error_after=after or 0.0),
    )


def _logits(scores: Sequence[float]) -> NDArray[np.float64]:
    clipped = np.clip(np.asarray(scores, dtype=float), EDGE, 1 - EDGE)
    logits: NDArray[np.float64] = np.log(clipped) - np.log1p(-clipped)
    return logits
