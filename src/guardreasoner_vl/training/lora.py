"""LoRA in SFT and RL: trainable adapters beside frozen weights.

    y = W x + s B (A x),   s = alpha / rank,   A drawn at random, B = 0 at the start

peft replaces the layers in place, so that the model is called as without adapters. W is held in bf16 unless the
precision is fp32; A and B are held as trainable weights are: in fp32, or in bf16 with fp32 copies in the optimizer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file

from guardreasoner_vl.engines.adapter import WEIGHTS, adapter_parameters, merge_adapter
from guardreasoner_vl.errors import MissingExtraError, RecipeError
from guardreasoner_vl.training.launch import shards_weights
from guardreasoner_vl.training.model_folder import copy_processor, emptied, load_for_training, move

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from guardreasoner_vl.images.geometry import PixelBudget
    from guardreasoner_vl.recipe import LoraSection, Precision, Recipe

ADAPTER = "adapter"
"""The folder of a stage's finished adapters, beside its merged model."""

_TOWER = "visual."


def load_trainable(folder: Path, recipe: Recipe, stage: Literal["sft", "grpo"]) -> Any:
    """The network of a stage, with what the recipe trains: all weights, or new adapters on frozen ones.

    Equal seeds give equal adapters. Raises `RecipeError` if a target of `lora` names no linear layer or the launch
    shares the weights, `MissingExtraError` without peft, `ModelError` if the folder's weights are broken.
    """
    section, lora = recipe.sft if stage == "sft" else recipe.grpo, recipe.lora
    if lora is None:
        model = load_for_training(folder, section.precision)
    elif shards_weights(section):
        raise RecipeError("with lora every GPU holds the whole frozen model: launch without accelerate's FSDP")
    else:
        model = load_for_training(folder, "fp32" if section.precision == "fp32" else "bf16-weights")
        add_adapters(model, lora, section.precision, recipe.seed, lora.dropout if stage == "sft" else 0.0)
    if section.freeze_vision:
        model.model.visual.requires_grad_(False)
    return model


def add_adapters(model: Any, lora: LoraSection, precision: Precision, seed: int = 0, dropout: float = 0.0) -> None:
    """Freeze the model and add adapters to it, in fp32 unless the precision is `bf16-weights`.

    Raises `RecipeError` if a target of `lora` names no linear layer, `MissingExtraError` without peft.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    adapted_names(model, lora.targets)  # refuses targets that fit no layer
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=dropout, target_modules=_targets_pattern(lora.targets)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(settings)
    if precision == "bf16":
        for parameter in adapter_parameters(model):
            parameter.data = parameter.data.float()


def adapted_names(model: Any, targets: Sequence[str]) -> list[str]:
    """The names of the layers that a recipe's `lora.targets` name.

    Raises `RecipeError` for a target that names no layer, or one that is not linear.
    """
    modules = dict(model.named_modules())
    for target in targets:
        matching = [name for name in modules if re.fullmatch(_targets_pattern([target]), name)]
        if not matching:
            raise RecipeError(f"lora.targets: {target} names no layer; use {', '.join(_linear_targets(modules))}")
        if other := [name for name in matching if not isinstance(modules[name], torch.nn.Linear)]:
            raise RecipeError(
                f"lora.targets: {target} names {other[0]}, which is not linear; "
                f"use {', '.join(_linear_targets(modules))}"
            )
    return [name for name in modules if re.fullmatch(_targets_pattern(targets), name)]


def adapter_size(model: Any, lora: LoraSection) -> int:
    """The number of weights in the adapters of a model, which may be on the meta device."""
    layers = [model.get_submodule(name) for name in adapted_names(model, lora.targets)]
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)


def adapts_tower(lora: LoraSection) -> bool:
    """Whether layers of the vision tower get adapters."""
    return any(target.startswith(_TOWER) for target in lora.targets)


def write_and_merge(model: Any, name: str, start: Path, folder: Path, budget: PixelBudget | None = None) -> None:
    """Write the adapters to `folder` in peft's layout, and merge them into the model.

    `name` is the base model that the adapter records, `start` that model's folder, whose image processor is written
    beside the adapter, with the limits on images changed to `budget`. Raises `ModelError` for NaN or
    infinity in an adapter.
    """
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = name
    partial = emptied(folder)
    save_file(
        {f"base_model.model.{name}": value.detach().contiguous().cpu() for name, value in weights.items()},
        partial / WEIGHTS,
        {"format": "pt"},
    )
    settings.save_pretrained(str(partial))
    copy_processor(start, partial, budget)
    move(partial, folder)
    merge_adapter(model)


def _targets_pattern(targets: Sequence[str]) -> str:
    """A regular expression, as peft reads it, for the whole names of the targets' layers."""
    text = [re.escape(name) for name in targets if not name.startswith(_TOWER)]
    tower = [re.escape(name.removeprefix(_TOWER)) for name in targets if name.startswith(_TOWER)]
    parts = [(r"model\.language_model\.", text), (r"model\.visual\.", tower)]
    return "|".join(rf"{root}(?:.*\.)?(?:{'|'.join(names)})" for root, names in parts if names)


def _linear_targets(modules: dict[str, Any]) -> list[str]:
    """The shortest targets that name linear layers alone, those of the language model first."""
    linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    others = modules.keys() - linear
    names = []
    for root, prefix in (("model.language_model.", ""), ("model.visual.", _TOWER)):
        for name in linear:
            parts = name.removeprefix(root).split(".") if name.startswith(root) else []
            starts = (start for start in reversed(range(len(parts))) if not parts[start].isdigit())
            targets = (prefix + ".".join(parts[start:]) for start in starts)
            names += [target for target in targets if not _names_any(target, others)][:1]
    return list(dict.fromkeys(names))


def _names_any(target: str, modules: Iterable[str]) -> bool:
    return any(re.fullmatch(_targets_pattern([target]), name) for name in modules)
