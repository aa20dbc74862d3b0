"""A guard for vision-language models: reads exchanges, returns reasoning and verdicts.

The names below are the public API. Importing the package does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guardreasoner_vl.engines.scripted import ScriptedEngine
    from guardreasoner_vl.errors import (
        DataError,
        EngineError,
        GuardError,
        ImageError,
        InputError,
        InputTooLongError,
        MissingExtraError,
        ModelError,
        RecipeError,
        RequestCancelledError,
        TrackerError,
    )
    from guardreasoner_vl.guard import Guard
    from guardreasoner_vl.images.decode import ImageLimits
    from guardreasoner_vl.images.geometry import PixelBudget
    from guardreasoner_vl.judging.calibration import Calibration
    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.remote.client import GuardClient
    from guardreasoner_vl.types import Exchange, Judgement, Label, Provenance, Sample, Turn, Verdict
    from guardreasoner_vl.version import __version__ as __version__

_HOMES = {
    "guardreasoner_vl.errors": (
        "DataError",
        "EngineError",
        "GuardError",
        "ImageError",
        "InputError",
        "InputTooLongError",
        "MissingExtraError",
        "ModelError",
        "RecipeError",
        "RequestCancelledError",
        "TrackerError",
    ),
    "guardreasoner_vl.guard": ("Guard",),
    "guardreasoner_vl.engines.scripted": ("ScriptedEngine",),
    "guardreasoner_vl.images.decode": ("ImageLimits",),
    "guardreasoner_vl.images.geometry": ("PixelBudget",),
    "guardreasoner_vl.judging.calibration": ("Calibration",),
    "guardreasoner_vl.judging.policy": ("Policy",),
    "guardreasoner_vl.remote.client": ("GuardClient",),
    "guardreasoner_vl.types": ("Exchange", "Judgement", "Label", "Provenance", "Sample", "Turn", "Verdict"),
    "guardreasoner_vl.version": ("__version__",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Calibration",
    "DataError",
    "EngineError",
    "Exchange",
    "Guard",
    "GuardClient",
    "GuardError",
    "ImageError",
    "ImageLimits",
    "InputError",
    "InputTooLongError",
    "Judgement",
    "Label",
    "MissingExtraError",
    "ModelError",
    "PixelBudget",
    "Policy",
    "Provenance",
    "RecipeError",
    "RequestCancelledError",
    "Sample",
    "ScriptedEngine",
    "TrackerError",
    "Turn",
    "Verdict",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
