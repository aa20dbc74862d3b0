"""Typed recipes, read from YAML. Unknown keys are refused with the name of the nearest known one."""

from guardreasoner_vl.recipe.base import Section
from guardreasoner_vl.recipe.data import (
    SAMPLES,
    BalanceSection,
    DataSection,
    DrawnSection,
    DuplicatesSection,
    SourceSection,
)
from guardreasoner_vl.recipe.load import Recipe, load_recipe, parse_recipe
from guardreasoner_vl.recipe.model import ModelSection, NewModel, ReadingSection, TextShape, VisionShape
from guardreasoner_vl.recipe.training import (
    AugmentSection,
    ClipSection,
    EvaluateSection,
    GrpoSection,
    KeepRule,
    MineSection,
    RewardForm,
    RewardSection,
    Schedule,
    SftSection,
)

__all__ = [
    "SAMPLES",
    "AugmentSection",
    "BalanceSection",
    "ClipSection",
    "DataSection",
    "DrawnSection",
    "DuplicatesSection",
    "EvaluateSection",
    "GrpoSection",
    "KeepRule",
    "MineSection",
    "ModelSection",
    "NewModel",
    "ReadingSection",
    "Recipe",
    "RewardForm",
    "RewardSection",
    "Schedule",
    "Section",
    "SftSection",
    "SourceSection",
    "TextShape",
    "VisionShape",
    "load_recipe",
    "parse_recipe",
]
