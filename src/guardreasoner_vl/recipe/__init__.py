"""Typed recipes, read from YAML. Unknown keys are refused with the name of the nearest known one."""

from guardreasoner_vl.recipe.base import Section
from guardreasoner_vl.recipe.data import (
    SAMPLES,
    BalanceSection,
    DataSection,
    DuplicatesSection,
    JoinedSection,
    MadeSection,
    SourceSection,
    VariedSection,
)
from guardreasoner_vl.recipe.load import Recipe, load_recipe, merged, parse_recipe
from guardreasoner_vl.recipe.model import ModelSection, NewModel, ReadingSection, TextShape, VisionShape
from guardreasoner_vl.recipe.training import (
    AugmentSection,
    ClipSection,
    EvaluateSection,
    GrpoSection,
    KeepRule,
    MineSection,
    Precision,
    RewardForm,
    RewardSection,
    Schedule,
    SftSection,
    SynthesizeSection,
)

__all__ = [
    "SAMPLES",
    "AugmentSection",
    "BalanceSection",
    "ClipSection",
    "DataSection",
    "DuplicatesSection",
    "EvaluateSection",
    "GrpoSection",
    "JoinedSection",
    "KeepRule",
    "MadeSection",
    "MineSection",
    "ModelSection",
    "NewModel",
    "Precision",
    "ReadingSection",
    "Recipe",
    "RewardForm",
    "RewardSection",
    "Schedule",
    "Section",
    "SftSection",
    "SourceSection",
    "SynthesizeSection",
    "TextShape",
    "VariedSection",
    "VisionShape",
    "load_recipe",
    "merged",
    "parse_recipe",
]
