"""Averages a model's weights before and after a training, which keeps more of what it could do before.

    w = (1 - a) w_before + a w_after

WiSE-FT (arXiv 2109.01903) for a model that was trained further on other data: a guard that learnt to read images, say,
forgets less about texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from guardreasoner_vl.engines.int8 import is_int8
from guardreasoner_vl.engines.model_files import WEIGHTS, check_folder, weight_files
from guardreasoner_vl.errors import InputError, ModelError
from guardreasoner_vl.training.model_folder import check_new, copy_texts, emptied, move, written

if TYPE_CHECKING:
    from pathlib import Path


def average(before: Path, after: Path, share: float, target: Path) -> None:
    """Write `target`: `share` of the weights of `after` and the rest of those of `before`, in bf16.

    Tokenizer and settings are those of `after`. Raises `ModelError` unless both folders hold models of one shape,
    stored in full, `InputError` if `target` is not empty or `share` is not between 0 and 1, `DataError` if the disk is
    full.
    """
    if not 0 <= share <= 1:
        raise InputError(f"a share of {share:g}: give a number from 0 to 1")
    check_new(target)
    first, second = (_weights(folder) for folder in (before, after))
    differing = sorted(name for name in first.keys() | second.keys() if _shape(first, name) != _shape(second, name))
    if differing:
        raise ModelError(
            f"{before} and {after} differ in the shape of {len(differing)} weights ({differing[0]:.80}); give the same "
            "model before and after a training"
        )
    mean = {
        name: (share * second[name].float() + (1 - share) * first[name].float()).to(torch.bfloat16) for name in first
    }
    with written(target, resumes="from the start"):
        partial = emptied(target)
        save_file(mean, partial / WEIGHTS, {"format": "pt"})
        copy_texts(after, partial)
        move(partial, target)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    check_folder(folder)
    if is_int8(folder):
        raise ModelError(f"{folder}: its weights are stored as int8; `guardreasoner-vl compact --expand` gives bf16")
    return {name: weight for path in weight_files(folder) for name, weight in load_file(path).items()}


def _shape(weights: dict[str, torch.Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None
