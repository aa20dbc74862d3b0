"""The records shared by all packages: `Exchange` (input), `Verdict` (output) and `Sample` (labelled data)."""

from guardreasoner_vl.types.exchange import Exchange, ImageSource, Turn, UnixLines, unix_lines
from guardreasoner_vl.types.image import CheckedImage
from guardreasoner_vl.types.sample import GoldLabel, Modality, Sample, Target
from guardreasoner_vl.types.verdict import (
    MODES,
    Frozen,
    Judgement,
    Label,
    Mode,
    ModelInfo,
    Usage,
    Verdict,
    VerdictError,
    same_model,
)

__all__ = [
    "MODES",
    "CheckedImage",
    "Exchange",
    "Frozen",
    "GoldLabel",
    "ImageSource",
    "Judgement",
    "Label",
    "Modality",
    "Mode",
    "ModelInfo",
    "Sample",
    "Target",
    "Turn",
    "UnixLines",
    "Usage",
    "Verdict",
    "VerdictError",
    "same_model",
    "unix_lines",
]
