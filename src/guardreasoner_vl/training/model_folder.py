"""Model folders: read for training; written whole or not at all, with the base model's text files."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from guardreasoner_vl.engines.model_files import CALIBRATION, PROCESSOR
from guardreasoner_vl.engines.weights import read_network
from guardreasoner_vl.errors import DataError, InputError, RecipeError, reason_of
from guardreasoner_vl.storage.atomic import PARTIAL, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from guardreasoner_vl.images.geometry import PixelBudget
    from guardreasoner_vl.recipe import Precision


def load_for_training(folder: Path, precision: Precision) -> Any:
    """Load the network in fp32, or in bf16 for precision `bf16-weights`, with its key-value cache switched off.

    Raises `ModelError` if the folder's weights are broken or incomplete.
    """
    model = read_network(folder, torch.bfloat16 if precision == "bf16-weights" else torch.float32)
    model.config.use_cache = False
    return model


def freeze_first_layers(model: Any, count: int) -> None:
    """Exclude the first `count` decoder layers and the embeddings from training; 0 trains all.

    Raises `RecipeError` if no layer would be trained.
    """
    text = model.model.language_model
    if count >= len(text.layers):
        raise RecipeError(f"sft.freeze_layers is {count}, but the model has {len(text.layers)} layers; give fewer")
    if count:
        for module in (text.embed_tokens, *text.layers[:count]):
            module.requires_grad_(False)


def write_model(
    model: Any, weights: Mapping[str, torch.Tensor], base: Path, folder: Path, budget: PixelBudget | None = None
) -> None:
    """Write `weights` in bf16 with the tokenizer and processor files of `base`; `model` is bf16 afterwards.

    With `budget` the folder's limits on images are changed to it.
    """
    halves: dict[int, torch.Tensor] = {}  # by address, so that tied weights stay tied
    weights = {name: halves.setdefault(value.data_ptr(), value.to(torch.bfloat16)) for name, value in weights.items()}
    model = model.to(torch.bfloat16)
    model.config.use_cache = True
    partial = emptied(folder)
    model.save_pretrained(partial, state_dict=weights)
    copy_texts(base, partial)
    if budget:
        _limit_pixels(partial / PROCESSOR, budget)
    move(partial, folder)


def check_new(folder: Path) -> None:
    """Raises `InputError` unless the folder does not exist, or is empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: exists already; give the name of a new folder")


def emptied(folder: Path) -> Path:
    """Create an empty temporary folder beside `folder` to write to, so that a kill leaves no partial `folder`."""
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def move(partial: Path, folder: Path) -> None:
    """Replace `folder` by `partial`, which `emptied` created."""
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def copy_texts(source: Path, folder: Path) -> None:
    """Copy the tokenizer, processor and template files that `folder` lacks; make its generation settings neutral.

    A calibration is not copied: it holds for the weights that it was measured with.
    """
    for path in source.iterdir():
        kept = path.suffix in (".json", ".txt", ".jinja") and not path.name.endswith(".index.json")
        if kept and path.name != CALIBRATION and not (folder / path.name).exists():
            shutil.copy2(path, folder / path.name)
    _make_generation_neutral(folder / "generation_config.json")


def _make_generation_neutral(path: Path) -> None:
    """Set greedy decoding without penalties: servers read defaults here, and a repetition penalty changes labels."""
    generation = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    token_ids = {name: _distinct(value) for name, value in generation.items() if name.endswith("_token_id")}
    neutral = {**token_ids, "do_sample": False, "repetition_penalty": 1.0}
    path.write_text(json.dumps(neutral, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _distinct(token_ids: Any) -> Any:
    """A list of ids without repetitions (a trainer puts its own before those of the model); other values unchanged."""
    return list(dict.fromkeys(token_ids)) if isinstance(token_ids, list) else token_ids


def copy_processor(source: Path, folder: Path, budget: PixelBudget | None = None) -> None:
    """Copy the settings of the image processor in `source`, with the limits on images changed to `budget`."""
    shutil.copy2(source / PROCESSOR, folder / PROCESSOR)
    if budget:
        _limit_pixels(folder / PROCESSOR, budget)


def _limit_pixels(path: Path, budget: PixelBudget) -> None:
    """Set the limits under all names that image processors read, so that training and every server agree."""
    settings = json.loads(path.read_text("utf-8"))
    settings |= {"min_pixels": budget.min_pixels, "max_pixels": budget.max_pixels}
    settings["size"] = {"shortest_edge": budget.min_pixels, "longest_edge": budget.max_pixels}
    write_json(path, settings)


@contextmanager
def written(path: Path, resumes: str = "from the last checkpoint") -> Iterator[None]:
    """Convert an error of the disk to `DataError`; other errors pass. `resumes` says where the next run resumes."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_disk(error):
            raise
        raise DataError(
            f"{path} could not be written ({reason_of(error, 120)}): make room; the same command resumes {resumes}"
        ) from error


def _is_of_disk(error: Exception) -> bool:
    """Whether the disk failed: torch raises `RuntimeError` for a full disk, but also for a device out of memory."""
    writers = ("PytorchStreamWriter", "inline_container")
    return not isinstance(error, RuntimeError) or any(name in str(error) for name in writers)
