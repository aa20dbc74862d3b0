"""Fit a guard's calibration to its predictions on labelled rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.curves import calibration_error, curve
from guardreasoner_vl.evaluation.results import judgement, truth
from guardreasoner_vl.judging.calibration import EDGE, PRESETS, Calibration, Measured, ModeScales, Scale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from guardreasoner_vl.choices import Preset
    from guardreasoner_vl.evaluation.predictions import Prediction
    from guardreasoner_vl.types import ModelInfo, Target

SMALLEST, LARGEST = 0.05, 20.0
FEWEST = 20
"""Minimum number of rows of each class to fit a scale."""

TRIED_WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
"""Candidate weights of the score before reasoning (`Scale.unreasoned`)."""

WORTH = 0.002
"""Nats by which the score before reasoning must lower the loss to be worth its extra forward pass."""

BALANCED = (PRESETS["balanced"], PRESETS["balanced"])
"""The usual false-positive rates of the preset `balanced`, for requests and for responses."""

_STEPS = 80
_GOLDEN = (math.sqrt(5) - 1) / 2


def fit(
    fast: Sequence[Prediction],
    slow: Sequence[Prediction],
    model: ModelInfo,
    data: str,
    reasoned: float = 0.3,
    balanced: tuple[float, float] = BALANCED,
) -> Calibration:
    """Fit both modes; `reasoned` is the wanted share of rows with reasoning in `hybrid` mode.

    `balanced` has the false-positive rates of that preset, for requests and for responses; the others have those of
    `PRESETS`. Raises `DataError` if no target has at least `FEWEST` scored rows of both classes.
    """
    modes = [_mode(fast, balanced), _mode(slow, balanced, {(row.benchmark, row.id): row for row in fast})]
    if not any(scale.measured for mode in modes for scale in (mode.request, mode.response)):
        raise DataError(f"{data}: fewer than {FEWEST} scored rows of a class; give more labelled rows")
    band, share = doubt_band(fast, modes[0], reasoned)
    return Calibration(model=model, data=data, fast=modes[0], slow=modes[1], band=band, reasoned=share)


def fit_temperature(truths: Sequence[bool], scores: Sequence[float]) -> float:
    """The temperature in [0.05, 20] that minimises the negative log-likelihood of the scaled scores."""
    return _best_temperature(truths, _logits(scores))[0]


def _best_temperature(truths: Sequence[bool], logits: NDArray[np.float64]) -> tuple[float, float]:
    """The best temperature, and the mean negative log-likelihood in nats."""
    signs = np.where(np.asarray(truths, dtype=bool), 1.0, -1.0)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, -signs * logits / math.exp(log_temperature)).mean())

    low, high = math.log(SMALLEST), math.log(LARGEST)
    for _ in range(_STEPS):  # golden-section search: the loss is convex in 1 / T, so it has one minimum
        lower, upper = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if loss(lower) <= loss(upper):
            high = upper
        else:
            low = lower
    return math.exp((low + high) / 2), loss((low + high) / 2)


def fit_weight(truths: Sequence[bool], after: Sequence[float], before: Sequence[float]) -> float:
    """The best of `TRIED_WEIGHTS` for the score before reasoning; 0 unless it lowers the loss by `WORTH`."""
    first, second = _logits(after), _logits(before)
    losses = {weight: _best_temperature(truths, first + weight * second)[1] for weight in TRIED_WEIGHTS}
    best = min(TRIED_WEIGHTS, key=losses.__getitem__)
    return best if losses[best] < losses[0.0] - WORTH else 0.0


def scaled(scores: Sequence[float], temperature: float) -> list[float]:
    """Calibrated scores: the sigmoid of the logits over the temperature."""
    return [float(value) for value in 1 / (1 + np.exp(-_logits(scores) / temperature))]


def threshold_at(truths: Sequence[bool], scores: Sequence[float], false_positive_rate: float) -> float:
    """The lowest threshold with at most this false-positive rate; above all scores if there is none."""
    allowed = [point.threshold for point in curve(truths, scores) if point.false_positive_rate <= false_positive_rate]
    return min(allowed) if allowed else min(1.0, math.nextafter(max(scores), 2.0))


def doubt_band(fast: Sequence[Prediction], scales: ModeScales, share: float) -> tuple[tuple[float, float], float]:
    """The band of scores around 1/2 that contains about `share` of the rows, and the actual share."""
    distances = np.array([distance for row in fast if (distance := _distance_from_half(row, scales)) is not None])
    if not len(distances) or share <= 0:
        return (0.5, 0.5), 0.0
    width = float(np.quantile(distances, min(share, 1.0), method="lower"))
    return (0.5 - width, 0.5 + width), float((distances <= width).mean())


def _distance_from_half(row: Prediction, scales: ModeScales) -> float | None:
    """Distance from 1/2 of the row's calibrated score that is nearer to it; None without scores."""
    pairs = ((row.request.score, scales.request), (row.response.score, scales.response))
    distances = [abs(scaled([score], scale.temperature)[0] - 0.5) for score, scale in pairs if score is not None]
    return min(distances, default=None)


def _mode(
    rows: Sequence[Prediction],
    balanced: tuple[float, float],
    earlier: Mapping[tuple[str, str], Prediction] | None = None,
) -> ModeScales:
    """The scales of one mode; `earlier` has the same rows judged without reasoning."""
    rates: list[dict[Preset, float]] = [{**PRESETS, "balanced": rate} for rate in balanced]
    request, response = (
        _scale(rows, target, of_target, earlier) for target, of_target in zip(TARGETS, rates, strict=True)
    )
    tokens = float(np.mean([row.completion_tokens for row in rows])) if rows else 0.0
    return ModeScales(request=request, response=response, completion_tokens=tokens)


def _scale(
    rows: Sequence[Prediction],
    target: Target,
    targets: Mapping[Preset, float],
    earlier: Mapping[tuple[str, str], Prediction] | None,
) -> Scale:
    """The scale of one target; the identity without enough rows of both classes."""
    scored = [
        (gold == "harmful", score, _score_before(row, target, earlier))
        for row in rows
        if (gold := truth(row, target)) is not None and (score := judgement(row, target).score) is not None
    ]
    both = [(gold, score, before) for gold, score, before in scored if before is not None]
    weight = fit_weight(*_columns(both)) if _enough(both) else 0.0
    truths, raw, before = _columns(both if weight else scored)
    if not _enough(scored):
        return Scale()
    logits = _logits(raw) + (weight * _logits(before) if weight else 0.0)
    temperature, _ = _best_temperature(truths, logits)
    scores = [float(value) for value in 1 / (1 + np.exp(-logits / temperature))]
    error_before, error_after = calibration_error(truths, raw), calibration_error(truths, scores)
    return Scale(
        temperature=temperature,
        unreasoned=weight,
        thresholds={preset: threshold_at(truths, scores, rate) for preset, rate in targets.items()},
        measured=Measured(rows=len(raw), error_before=error_before or 0.0, error_after=error_after or 0.0),
    )


def _enough(rows: Sequence[tuple[bool, float, Any]]) -> bool:
    """Whether there are at least `FEWEST` rows of each class."""
    harmful = sum(gold for gold, _, _ in rows)
    return min(harmful, len(rows) - harmful) >= FEWEST


def _columns(rows: Sequence[tuple[bool, float, Any]]) -> tuple[list[bool], list[float], list[Any]]:
    return [gold for gold, _, _ in rows], [score for _, score, _ in rows], [before for _, _, before in rows]


def _score_before(
    row: Prediction, target: Target, earlier: Mapping[tuple[str, str], Prediction] | None
) -> float | None:
    if earlier is None or (same := earlier.get((row.benchmark, row.id))) is None:
        return None
    return judgement(same, target).score


def _logits(scores: Sequence[float]) -> NDArray[np.float64]:
    clipped = np.clip(np.asarray(scores, dtype=float), EDGE, 1 - EDGE)
    logits: NDArray[np.float64] = np.log(clipped) - np.log1p(-clipped)
    return logits
