"""A guard's calibration: temperatures, thresholds and the hybrid band, as `guardreasoner-vl calibrate` measured them.

Guards are overconfident, so a score's logit is divided by a temperature that is fitted on labelled data. A threshold is
the lowest calibrated score at which the false-positive rate does not exceed the preset's target.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from pydantic import Field, ValidationError

from guardreasoner_vl.choices import Preset
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.types import Frozen, ModelInfo

EDGE = 1e-6
"""Scores are clipped to [EDGE, 1 - EDGE], so that a single wrong score of 0 or 1 does not dominate the fit."""

PRESETS: dict[Preset, float] = {"strict": 0.10, "balanced": 0.05, "permissive": 0.01}
"""The target false-positive rate of each preset; a strict guard blocks more."""


class Measured(Frozen):
    """The expected calibration error before and after scaling, on the rows that the scale was fitted to."""

    rows: int = Field(ge=1, description="Number of labelled rows.")
    error_before: float = Field(ge=0, le=1, description="Expected calibration error of the raw scores.")
    error_after: float = Field(ge=0, le=1, description="Expected calibration error of the scaled scores.")


class Scale(Frozen):
    """Calibrates one target's raw scores in one mode; holds a threshold for each preset.

    After reasoning, scores are close to 0 or 1 and rank badly (LeanGuard, arXiv 2606.26686). `unreasoned` is the weight
    of the raw score without reasoning: in `slow` mode its logit, times this weight, is added to the logit of the score
    after reasoning. With too few rows the scale is the identity and `measured` is None.
    """

    temperature: float = Field(default=1.0, gt=0, description="The score's logit is divided by it.")
    unreasoned: float = Field(default=0.0, ge=0, description="Weight of the score without reasoning.")
    thresholds: dict[Preset, float] = Field(
        default_factory=dict, description="Lowest scaled score that is harmful, for each preset."
    )
    measured: Measured | None = Field(default=None, description="What scaling changed; null: too few rows.")


class ModeScales(Frozen):
    """The scales of request and response in one mode, and the mean number of output tokens of a verdict."""

    request: Scale = Field(default=Scale(), description="Scale of the request's score.")
    response: Scale = Field(default=Scale(), description="Scale of the response's score.")
    completion_tokens: float = Field(default=0.0, ge=0, description="Mean number of output tokens of a verdict.")


class Calibration(Frozen):
    """The calibration of one model. `reasoned` is the share of rows that `hybrid` reasons about with this `band`."""

    model: ModelInfo = Field(description="The model that was measured.")
    data: str = Field(description="What it was measured on.")
    fast: ModeScales = Field(description="Scales of `fast` mode.")
    slow: ModeScales = Field(description="Scales of `slow` mode.")
    band: tuple[float, float] = Field(description="Scores, lowest and highest, that `hybrid` reasons about.")
    reasoned: float = Field(ge=0, le=1, description="Share of the rows that `hybrid` reasons about.")

    @property
    def hybrid_tokens(self) -> float:
        """The expected number of output tokens of a verdict in `hybrid` mode."""
        return self.fast.completion_tokens + self.reasoned * self.slow.completion_tokens


def read_calibration(path: str | Path) -> Calibration:
    """Read a calibration file. Raises `InputError` if it cannot be read or is not a calibration."""
    try:
        return Calibration.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file that calibrate wrote") from error
    except ValidationError as error:
        raise InputError(f"{path}: not a calibration; give a file that calibrate wrote") from error


def check_preset(name: str) -> Preset:
    """The preset called `name`. Raises `InputError` if it is unknown."""
    for preset in get_args(Preset):
        if preset == name:
            return preset  # type: ignore[no-any-return]
    raise InputError(f"unknown preset {name!r}: use {', '.join(get_args(Preset))}")
