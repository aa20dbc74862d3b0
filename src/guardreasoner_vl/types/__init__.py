"""The records shared by all packages: `Exchange` (input), `Verdict` (output) and `Sample` (labelled data)."""

from guardreasoner_vl.types.exchange import Exchange, ImageSource, Turn, UnixLines, unix_lines
from guardreasoner_vl.types.image import CheckedImage
from guardreasoner_vl.types.sample import GoldLabel, Modality, Parent, Provenance, Sample, Target
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
    failed_verdict,
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
    "Parent",
    "Provenance",
    "Sample",
    "Target",
    "Turn",
    "UnixLines",
    "Usage",
    "Verdict",
    "VerdictError",
    "failed_verdict",
    "same_model",
    "unix_lines",
]
