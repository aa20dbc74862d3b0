"""The settings that decide a verdict, besides the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from guardreasoner_vl.choices import MODES, Action, LongInput, Mode, Ocr, Preset
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.images.decode import ImageLimits
from guardreasoner_vl.judging.calibration import Calibration, Scale, check_preset

if TYPE_CHECKING:
    from guardreasoner_vl.images.geometry import PixelBudget
    from guardreasoner_vl.types import ModelInfo

FAULTS_OF_THE_GUARD = frozenset({"engine", "engine_gone", "engine_down", "auth", "queue_full"})
"""Codes of the errors that `on_error` "allow" lets pass.

The author of an exchange can cause other errors by what it holds (`invalid_image`, an answer of the guard outside the
grammar) or by its length (`input_too_long`, `deadline`, `timeout`, a caller's `rate_limited`).
"""

DOUBT = (0.1, 0.9)
"""The band of scores that `hybrid` mode reasons about if neither the policy nor a calibration sets one."""

MAX_WINDOWS = 128
"""The default limit on the windows of one exchange. With the embedded guard 128 windows hold 200,000 characters of
English; in slow mode a service's limit of 120 s is reached first if a window takes more than 0.9 s."""


def action_on_error(code: str, on_error: Action) -> Action:
    """The action for an exchange that could not be judged because of the error `code`."""
    return on_error if code in FAULTS_OF_THE_GUARD else "block"


@dataclass(frozen=True)
class Policy:
    """The settings that decide a verdict, besides the model.

    Attributes:
        mode: `slow` reasons first, `fast` gives the verdict only, `hybrid` reasons where a fast score lies in the band.
        thresholds: Lowest P(harmful) at which request and response are harmful; None: the preset's, else the label.
        band: Scores, lowest and highest, that `hybrid` reasons about; None: the calibration's, else 0.1 to 0.9.
        calibration: Temperatures, thresholds and band that `calibrate` measured; None: raw scores.
        folder_calibration: Whether `Guard.load` takes the calibration in the model's folder where none is given.
        preset: The calibration's thresholds to use: `strict`, `balanced` or `permissive`; unused without a calibration.
        on_error: The action for what a fault of the guard left unjudged (`FAULTS_OF_THE_GUARD`). What its author may
            have made impossible to judge, such as an unreadable image, is blocked.
        max_new_tokens: Longest answer in tokens.
        retry_new_tokens: Longest answer in tokens of the retry after a cut one; not above `max_new_tokens`: no retry.
        long_input: `refuse` what exceeds the model's context, or judge overlapping `windows`; the worst verdict wins.
        window_overlap: Share of a window that it has in common with the next one, in [0, 1).
        max_windows: Most windows of one exchange; one that needs more is an `input_too_long` error.
        images: Limits on images: bytes, pixels, frames, formats and aspect ratio.
        pixels: Area that images are resized to; None: the model's own.
        ocr: Whether the words printed in images are read before the model judges, and put before the prompt: `auto`,
            for a model that does not read them itself (`ModelInfo.transcribes`), which gets them instead of the image;
            `always` or `never`.
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
    long_input: LongInput = "refuse"
    window_overlap: float = 0.2
    max_windows: int = MAX_WINDOWS
    images: ImageLimits = field(default_factory=ImageLimits)
    pixels: PixelBudget | None = None
    ocr: Ocr = "auto"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"unknown mode {self.mode!r}: use one of {', '.join(MODES)}")
        if self.on_error not in get_args(Action):
            raise InputError(f"unknown on_error {self.on_error!r}: use block or allow")
        if self.long_input not in get_args(LongInput):
            raise InputError(f"unknown long_input {self.long_input!r}: use refuse or windows")
        if self.ocr not in get_args(Ocr):
            raise InputError(f"unknown ocr {self.ocr!r}: use {', '.join(get_args(Ocr))}")
        if self.max_new_tokens < 1:
            raise InputError("max_new_tokens is a number of tokens: give at least 1")
        if len(self.thresholds) != 2:
            raise InputError(
                "thresholds must be two values, for the request and the response; use None for no threshold"
            )
        if not all(value is None or 0 <= value <= 1 for value in self.thresholds):
            raise InputError("a threshold is a probability: give a number from 0 to 1")
        if self.band is not None and not 0 <= self.band[0] <= self.band[1] <= 1:
            raise InputError("the band must be two probabilities, the lower one first")
        if not 0 <= self.window_overlap < 1:
            raise InputError("window_overlap is a fraction of a window: give a number of at least 0 and less than 1")
        if self.max_windows < 1:
            raise InputError("max_windows is a number of windows: give at least 1")
        check_preset(self.preset)

    def as_json(self) -> dict[str, Any]:
        """The policy as plain data, calibration included. Guards with equal policies and one model judge alike."""
        limits = {**asdict(self.images), "formats": sorted(self.images.formats)}
        calibration = self.calibration and self.calibration.model_dump(mode="json")
        plain = {name: value for name, value in asdict(self).items() if name != "folder_calibration"}
        return {**plain, "images": limits, "calibration": calibration}

    @property
    def doubt(self) -> tuple[float, float]:
        """The scores that `hybrid` mode reasons about: `band`, else the calibration's band, else `DOUBT`."""
        return self.band or (self.calibration.band if self.calibration else DOUBT)

    def reads_printed_text(self, model: ModelInfo) -> bool:
        """Whether the words printed in images are read for `model`."""
        return self.ocr == "always" or (self.ocr == "auto" and not model.transcribes)

    def scales(self, mode: Literal["fast", "slow"]) -> tuple[Scale, Scale]:
        """The scales of the request's and the response's scores; the identity without a calibration."""
        if self.calibration is None:
            return Scale(), Scale()
        scales = self.calibration.fast if mode == "fast" else self.calibration.slow
        return scales.request, scales.response

    def cutoffs(self, mode: Literal["fast", "slow"]) -> tuple[float | None, float | None]:
        """Lowest scores at which the request and the response are harmful; None lets the label decide."""
        pairs = zip(self.thresholds, self.scales(mode), strict=True)
        first, second = (own if own is not None else scale.thresholds.get(self.preset) for own, scale in pairs)
        return first, second
