"""A model folder: read for training; written whole or not at all, the base model's texts beside the weights."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from guardreasoner_vl.engines.model_files import CALIBRATION
from guardreasoner_vl.engines.weights import read_network
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.storage.atomic import PARTIAL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from guardreasoner_vl.recipe import Precision


def load_for_training(folder: Path, precision: Precision) -> Any:
    """The network in fp32, or in bf16 where the recipe holds weights so; its own cache of keys and values off.

    Raises `ModelError` if the folder's weights are broken or incomplete.
    """
    model = read_network(folder, torch.bfloat16 if precision == "bf16-weights" else torch.float32)
    model.config.use_cache = False
    return model


def write_model(model: Any, weights: Mapping[str, torch.Tensor], base: Path, folder: Path) -> None:
    """`weights` in bf16 beside the tokenizer and processor files of `base`; `model` is bf16 afterwards."""
    halves: dict[int, torch.Tensor] = {}  # by address, so that tied weights stay tied
    weights = {name: halves.setdefault(value.data_ptr(), value.to(torch.bfloat16)) for name, value in weights.items()}
    model = model.to(torch.bfloat16)
    model.config.use_cache = True
    partial = emptied(folder)
    model.save_pretrained(partial, state_dict=weights)
    copy_texts(base, partial)
    move(partial, folder)


def emptied(folder: Path) -> Path:
    """A new folder beside `folder` to write in, so that a kill leaves no half of it."""
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def move(partial: Path, folder: Path) -> None:
    """Put what `emptied` gave in its place."""
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def copy_texts(source: Path, folder: Path) -> None:
    """Copy the tokenizer, processor and template files that `folder` lacks; make its generation settings neutral.

    A calibration is of the weights that it was measured with, so it stays behind.
    """
    for path in source.iterdir():
        kept = path.suffix in (".json", ".txt", ".jinja") and not path.name.endswith(".index.json")
        if kept and path.name != CALIBRATION and not (folder / path.name).exists():
            shutil.copy2(path, folder / path.name)
    _make_generation_neutral(folder / "generation_config.json")


def _make_generation_neutral(path: Path) -> None:
    """Greedy, without penalties: servers take defaults from this file, and Qwen's repetition penalty changes labels."""
    generation = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    token_ids = {name: value for name, value in generation.items() if name.endswith("_token_id")}
    neutral = {**token_ids, "do_sample": False, "repetition_penalty": 1.0}
    path.write_text(json.dumps(neutral, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def written(path: Path, goes_on: str = "from the last checkpoint") -> Iterator[None]:
    """Turn an error of the disk into a `DataError`; other errors pass. `goes_on` says where the next run resumes."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_disk(error):
            raise
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"{path} could not be written ({reason}): make room; the same command goes on {goes_on}"
        ) from error


def _is_of_disk(error: Exception) -> bool:
    """torch raises `RuntimeError` for a full disk, but also for a device that ran out of memory."""
    writers = ("PytorchStreamWriter", "inline_container")
    return not isinstance(error, RuntimeError) or any(name in str(error) for name in writers)
