"""Reading and checking a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.recipe.base import Section
from guardreasoner_vl.recipe.data import DataSection
from guardreasoner_vl.recipe.lora import LoraSection
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

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class Recipe(Section):
    """How one guard is made."""

    name: str = Field(description="Name of the recipe and of the corpus that it makes.")
    seed: int = Field(default=0, description="Seed of every random choice: draws, splits, weights and rollouts.")
    model: ModelSection | None = Field(
        default=None, description="Where training starts. Null: the recipe makes a corpus only."
    )
    data: DataSection = Field(default=DataSection(), description="What is trained on (paper, section 3.1).")
    synthesize: SynthesizeSection = Field(
        default=SynthesizeSection(), description="Who writes the reasoning of the corpus (paper, section 3.1)."
    )
    sft: SftSection = Field(
        default=SftSection(), description="Supervised fine-tuning on reasoning, R-SFT (paper, section 3.2)."
    )
    lora: LoraSection | None = Field(
        default=None,
        description="Train adapters on a frozen model in `sft` and in `grpo`; both write the merged model too. Null: "
        "train all weights (paper).",
    )
    mine: MineSection = Field(default=MineSection(), description="Hard-sample mining (paper, section 3.3).")
    augment: AugmentSection = Field(
        default=AugmentSection(), description="Safety-aware data concatenation (paper, section 3.3)."
    )
    grpo: GrpoSection = Field(default=GrpoSection(), description="Online RL (paper, section 3.3).")
    evaluate: EvaluateSection = Field(
        default=EvaluateSection(), description="What the finished models are measured on (paper, Tables 1 and 2)."
    )
    tracker: tuple[TrackerName, ...] = Field(
        default=("tensorboard",),
        description="Where `sft` and `grpo` report learning curves; a single name may stand without a list. "
        "`tensorboard` writes into the run folder, the others need `pip install NAME` and their own settings in the "
        "environment. `none`: nowhere. May change at any time.",
    )

    @field_validator("tracker", mode="before")
    @classmethod
    def _listed(cls, tracker: object) -> object:
        if isinstance(tracker, str):
            return () if tracker == "none" else (tracker,)
        return tracker

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model and self.model.new and self.sft.max_length > self.model.new.text.max_positions:
            raise ValueError("sft.max_length is more than model.new.text.max_positions; lower it or raise the other")
        return self

    @model_validator(mode="after")
    def _no_shards_of_a_new_model(self) -> Self:
        """One process makes the start model, and ZeRO stage 3 would wait for the others at each of its weights."""
        if self.sft.zero_3 and self.model and (self.model.new or self.model.base):
            raise ValueError(
                "DeepSpeed's ZeRO stage 3 would take a new model apart before it is written: give model.path, the "
                "folder of a finished model (`base` writes one), or set sft.deepspeed to null"
            )
        if self.sft.zero_3 and self.model and self.model.reading:
            raise ValueError(
                "DeepSpeed's ZeRO stage 3 would take the model apart before it learns to read: remove model.reading, "
                "or set sft.deepspeed to null"
            )
        return self

    @model_validator(mode="after")
    def _beside_adapters(self) -> Self:
        if self.lora is None:
            return self
        sharing = {
            "sft.deepspeed": self.sft.deepspeed,
            "sft.shard_weights": self.sft.shard_weights,
            "grpo.shard_weights": self.grpo.shard_weights,
        }
        if used := [name for name, value in sharing.items() if value]:
            raise ValueError(f"with lora every GPU holds the whole frozen model; remove {' and '.join(used)}")
        tower = [target for target in self.lora.targets if target.startswith("visual.")]
        frozen = [name for name, section in (("sft", self.sft), ("grpo", self.grpo)) if section.freeze_vision]
        if tower and frozen:
            raise ValueError(f"lora.targets has {tower[0]}, but {frozen[0]}.freeze_vision is true; change one of them")
        return self

    @property
    def base(self) -> ModelSection:
        """Where training starts; raises `RecipeError` for a recipe without `model`."""
        if self.model is None:
            raise RecipeError(f"recipe {self.name}: no model to train; give `model.path` or `model.new`")
        return self.model


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe; raises `RecipeError` with one line that says what to change.

    `extends: OTHER.yaml` inherits from that recipe in the same folder: mappings are merged key by key, any other value
    replaces the inherited one.
    """
    return parse_recipe(_read_mapping(Path(path)), str(path))


def _read_mapping(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read; give the path of a YAML recipe") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML ({str(error).splitlines()[0]}); correct its syntax") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a YAML mapping with the keys {', '.join(Recipe.model_fields)}")
    extended = content.pop("extends", None)
    if extended is None:
        return content
    other = path.parent / str(extended)
    if other in (path, *below):
        raise RecipeError(f"{path}: extends {extended}, which extends it; remove one of the two")
    return merged(_read_mapping(other, (path, *below)), content)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` overridden by `new`: mappings are merged key by key, any other value is replaced."""
    return old | {
        key: merged(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
        for key, value in new.items()
    }


def parse_recipe(content: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe given as a mapping; `where` names it in the message. Raises `RecipeError`."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {first_problem(error.errors(), Recipe, 'recipe')}") from error
