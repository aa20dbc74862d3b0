"""The records shared by all packages: `Exchange` (input), `Verdict` (output) and `Sample` (labelled data)."""

from guardreasoner_vl.choices import MODES, TARGETS, Mode, Target
from guardreasoner_vl.types.exchange import Exchange, ImageSource, Turn, UnixLines, unix_lines
from guardreasoner_vl.types.image import CheckedImage
from guardreasoner_vl.types.sample import GoldLabel, Modality, Parent, Provenance, Sample
from guardreasoner_vl.types.verdict import (
    Frozen,
    Judgement,
    Label,
    ModelInfo,
    Usage,
    Verdict,
    VerdictError,
    failed_verdict,
    same_model,
)

__all__ = [
    "MODES",
    "TARGETS",
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
