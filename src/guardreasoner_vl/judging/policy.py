"""Everything that decides a verdict besides the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.images.decode import ImageLimits
from guardreasoner_vl.judging.calibration import Calibration, Preset, Scale, check_preset
from guardreasoner_vl.types import MODES, Mode

if TYPE_CHECKING:
    from guardreasoner_vl.images.geometry import PixelBudget

Action = Literal["allow", "block"]
DOUBT = (0.1, 0.9)
"""Scores that `hybrid` mode reasons about if nothing else was measured."""

MAX_WINDOWS = 128
"""Windows of one exchange if nothing else is set. With the embedded guard they hold 200,000 characters of English and
take 40 s in slow mode on 2 cores; a service's 120 s suffice while a round of all under way takes below 0.9 s."""


@dataclass(frozen=True)
class Policy:
    """Everything that decides a verdict besides the model.

    `thresholds`: from which score on the request and the response are harmful; None leaves it to the calibration's
    `preset`, and without one to the label. `calibration` also scales the scores and gives `hybrid` its band; without
    one, `Guard.load` takes the file in the model's folder, if `folder_calibration`.
    `band`: in `hybrid` mode, scores inside it are reasoned about. `long_input`: refuse what does not fit, or
    judge overlapping windows, at most `max_windows` of them, and let the worst verdict win.
    """

    mode: Mode = "slow"
    thresholds: tuple[float | None, float | None] = (None, None)
    band: tuple[float, float] | None = None
    calibration: Calibration | None = None
    folder_calibration: bool = True
    preset: Preset = "balanced"
    on_error: Action = "block"
    max_new_tokens: int = 1024
    retry_new_tokens: int = 4096
    long_input: Literal["refuse", "windows"] = "refuse"
    window_overlap: float = 0.2
    max_windows: int = MAX_WINDOWS
    images: ImageLimits = field(default_factory=ImageLimits)
    pixels: PixelBudget | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"unknown mode {self.mode!r}: use one of {', '.join(MODES)}")
        if self.on_error not in ("allow", "block"):
            raise InputError(f"unknown on_error {self.on_error!r}: use block or allow")
        if self.long_input not in ("refuse", "windows"):
            raise InputError(f"unknown long_input {self.long_input!r}: use refuse or windows")
        if self.max_new_tokens < 1:
            raise InputError("max_new_tokens is a number of tokens: give at least 1")
        if len(self.thresholds) != 2:
            raise InputError("thresholds are two: one for the request, one for the response; None leaves one out")
        if not all(value is None or 0 <= value <= 1 for value in self.thresholds):
            raise InputError("a threshold is a probability: give a number from 0 to 1")
        if self.band is not None and not 0 <= self.band[0] <= self.band[1] <= 1:
            raise InputError("the band is two probabilities, the lower one first")
        if not 0 <= self.window_overlap < 1:
            raise InputError("window_overlap is a share of a window: give a number from 0 to below 1")
        if self.max_windows < 1:
            raise InputError("max_windows is a number of windows: give at least 1")
        check_preset(self.preset)

    def as_json(self) -> dict[str, Any]:
        """Plain data, the calibration included: two guards of one model with the same give the same verdicts."""
        limits = {**asdict(self.images), "formats": sorted(self.images.formats)}
        calibration = self.calibration and self.calibration.model_dump(mode="json")
        plain = {name: value for name, value in asdict(self).items() if name != "folder_calibration"}
        return {**plain, "images": limits, "calibration": calibration}

    @property
    def doubt(self) -> tuple[float, float]:
        """The scores that `hybrid` mode reasons about: the band, else the calibration's, else the middle."""
        return self.band or (self.calibration.band if self.calibration else DOUBT)

    def scales(self, mode: Literal["fast", "slow"]) -> tuple[Scale, Scale]:
        """How the scores of the request and of the response are scaled."""
        if self.calibration is None:
            return Scale(), Scale()
        found = self.calibration.fast if mode == "fast" else self.calibration.slow
        return found.request, found.response

    def cutoffs(self, mode: Literal["fast", "slow"]) -> tuple[float | None, float | None]:
        """From which score on the request and the response are harmful; None lets the label decide."""
        given = zip(self.thresholds, self.scales(mode), strict=True)
        first, second = (own if own is not None else scale.thresholds.get(self.preset) for own, scale in given)
        return first, second
