"""Reading and checking a recipe."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml
from pydantic import BaseModel, ValidationError, model_validator

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

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


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
        raise RecipeError(f"{where}: {_first_problem(error.errors())}") from error


def _first_problem(problems: list[ErrorDetails]) -> str:
    """An unknown key before others: it may be the missing one, misspelt."""
    problem = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{place or 'recipe'}: {problem['msg'].removeprefix('Value error, ')}"
    close = _nearest([str(part) for part in problem["loc"]])
    hint = f"; did you mean {close!r}?" if close else "; remove it"
    return f"unknown key {place!r}{hint}"


def _nearest(place: list[str]) -> str | None:
    """The known key closest to the unknown one: misplaced, misspelt, or both; with its full name if elsewhere."""
    known = _known_keys(Recipe)
    own = ".".join(part for part in place[:-1] if not part.isdigit())
    keys = {name: name for name, section in known if section == own}
    elsewhere = {name: f"{section}.{name}" if section else name for name, section in known if section != own}
    for names, likeness in ((elsewhere, 1.0), (keys, 0.6), (elsewhere, 0.6)):
        close = difflib.get_close_matches(place[-1], names, n=1, cutoff=likeness)
        if close:
            return names[close[0]]
    return None


def _known_keys(section: type[BaseModel], place: str = "") -> list[tuple[str, str]]:
    """Every key and the dotted name of the section that it stands in, outer ones last."""
    keys: list[tuple[str, str]] = []
    for name, field in section.model_fields.items():
        inner = f"{place}.{name}" if place else name
        for kind in _parts(field.annotation):
            if issubclass(kind, Section):
                keys += _known_keys(kind, inner)
    return keys + [(name, place) for name in section.model_fields]


def _parts(annotation: Any) -> list[type]:
    inner = getattr(annotation, "__args__", ())
    return [annotation] if isinstance(annotation, type) and not inner else [p for a in inner for p in _parts(a)]
