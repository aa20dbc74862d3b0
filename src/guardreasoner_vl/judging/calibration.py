"""A guard's calibration: temperatures, thresholds and the hybrid band, as `guardreasoner-vl calibrate` measured them.

Guards are overconfident: a score is divided, as a logit, by a temperature fitted on labelled data. A threshold is the
lowest calibrated score from which on the false-positive rate stays at the preset's target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, ValidationError

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.types import Frozen, ModelInfo

EDGE = 1e-6
"""Scores closer than this to 0 or 1 are taken as that close, so that one certain mistake does not decide alone."""

Preset = Literal["strict", "balanced", "permissive"]
PRESETS: dict[Preset, float] = {"strict": 0.10, "balanced": 0.05, "permissive": 0.01}
"""The false-positive rate that each preset aims at: a strict guard blocks more."""


class Measured(Frozen):
    """The expected calibration error before and after, on the rows that the scale was fitted to."""

    rows: int = Field(ge=1)
    error_before: float = Field(ge=0, le=1)
    error_after: float = Field(ge=0, le=1)


class Scale(Frozen):
    """What turns one target's raw score in one mode into a calibrated one, and a threshold for each preset.

    After reasoning a score stands near 0 or 1 and ranks badly (LeanGuard, arXiv 2606.26686). `unreasoned` is the weight
    of the raw score without reasoning: in `slow` mode its logit, times this, is added to the logit of the score after
    reasoning. The identity, with nothing measured, where there were too few rows.
    """

    temperature: float = Field(default=1.0, gt=0)
    unreasoned: float = Field(default=0.0, ge=0)
    thresholds: dict[Preset, float] = Field(default_factory=dict)
    measured: Measured | None = None


class ModeScales(Frozen):
    """Both targets' scales in one mode, and the output tokens that a verdict took."""

    request: Scale = Scale()
    response: Scale = Scale()
    completion_tokens: float = Field(default=0.0, ge=0)


class Calibration(Frozen):
    """For one model. `reasoned` is the share of rows that `hybrid` reasons about with this `band`."""

    model: ModelInfo
    data: str
    fast: ModeScales
    slow: ModeScales
    band: tuple[float, float]
    reasoned: float = Field(ge=0, le=1)

    @property
    def hybrid_tokens(self) -> float:
        """Output tokens that a verdict is expected to take in `hybrid` mode."""
        return self.fast.completion_tokens + self.reasoned * self.slow.completion_tokens


def read_calibration(path: str | Path) -> Calibration:
    """Raises `InputError` if the file cannot be read or is none."""
    try:
        return Calibration.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file that calibrate wrote") from error
    except ValidationError as error:
        raise InputError(f"{path}: not a calibration; give a file that calibrate wrote") from error


def check_preset(name: str) -> Preset:
    """Raises `InputError` for an unknown one."""
    for preset in get_args(Preset):
        if preset == name:
            return preset  # type: ignore[no-any-return]
    raise InputError(f"unknown preset {name!r}: use {', '.join(get_args(Preset))}")
