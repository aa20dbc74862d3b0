"""Reading and checking a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError, model_validator

from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.recipe.base import Section
from guardreasoner_vl.recipe.data import DataSection
from guardreasoner_vl.recipe.model import ModelSection
from guardreasoner_vl.recipe.training import (
    AugmentSection,
    EvaluateSection,
    GrpoSection,
    MineSection,
    SftSection,
    SynthesizeSection,
)
from guardreasoner_vl.recipe.unknown import first_problem


class Recipe(Section):
    """How one guard is made; one without a `model` makes a corpus."""

    name: str
    seed: int = 0
    model: ModelSection | None = None
    data: DataSection = DataSection()
    synthesize: SynthesizeSection = SynthesizeSection()
    sft: SftSection = SftSection()
    mine: MineSection = MineSection()
    augment: AugmentSection = AugmentSection()
    grpo: GrpoSection = GrpoSection()
    evaluate: EvaluateSection = EvaluateSection()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model and self.model.new and self.sft.max_length > self.model.new.text.max_positions:
            raise ValueError("sft.max_length is more than model.new.text.max_positions; lower it or raise the other")
        return self

    @property
    def base(self) -> ModelSection:
        """Where training starts; raises `RecipeError` if the recipe does not say."""
        if self.model is None:
            raise RecipeError(f"recipe {self.name}: no model to train; give `model.path` or `model.new`")
        return self.model


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe; raises `RecipeError` with one line that says what to change.

    `extends: OTHER.yaml` takes over what that recipe, found beside this one, says: mappings are merged key by
    key, anything else is replaced.
    """
    return parse_recipe(_content(Path(path)), str(path))


def _content(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read; give the path of a YAML recipe") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a YAML mapping with the keys {', '.join(Recipe.model_fields)}")
    extended = content.pop("extends", None)
    if extended is None:
        return content
    other = path.parent / str(extended)
    if other in (path, *below):
        raise RecipeError(f"{path}: extends {extended}, which extends it; remove one of the two")
    return merged(_content(other, (path, *below)), content)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with what `new` says: mappings key by key, anything else replaced."""
    return old | {
        key: merged(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
        for key, value in new.items()
    }


def parse_recipe(content: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe given as a mapping."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {first_problem(error.errors(), Recipe, 'recipe')}") from error
