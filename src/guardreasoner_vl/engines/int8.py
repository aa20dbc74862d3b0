"""Weights stored in half the room: a row of a matrix as int8 numbers and one scale, everything else in bf16.

    s = max|w| / 127 over a row,   q = round(w / s),   w' = q s        so that |w - w'| <= s / 2

This is absmax quantisation (arXiv 2208.07339, section 2.1) of storage alone: the network computes with w'.

The file is an ordinary safetensors file, but not under the name that transformers looks for: a tool that does not
know the scheme would take q for weights without a word. Matrices keep their names, a scale is `NAME.scale`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from guardreasoner_vl.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

INT8_WEIGHTS = "model.int8.safetensors"
SCALE = ".scale"
METADATA = {"storage": "int8-rows"}
"""The file's metadata; with a second key its bytes would vary, because safetensors writes keys in random order."""

_HIGHEST = 127
_AT_ONCE = 1 << 15  # weights: more are shared among threads, which takes seconds where other programs use the cores


def is_int8(folder: Path) -> bool:
    """Whether a model folder's weights are stored so."""
    return (folder / INT8_WEIGHTS).is_file()


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 numbers of a matrix and the scales of its rows, in bf16, of shape (rows, 1)."""
    weight = weight.float()
    scale = (weight.abs().amax(1, keepdim=True) / _HIGHEST).to(torch.bfloat16)
    scale = scale.clamp_min(torch.finfo(torch.bfloat16).tiny)  # a row of zeros
    return (weight / scale.float()).round().to(torch.int8), scale  # bf16 takes a 256th off a scale at most: 127.496


def dequantised(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix in `dtype`, computed in fp32."""
    weight, scale = torch.empty(stored.shape, dtype=dtype), scale.float()
    step = max(1, _AT_ONCE // stored.shape[1])
    for start in range(0, len(stored), step):
        rows = slice(start, start + step)
        torch.mul(stored[rows], scale[rows], out=weight[rows])
    return weight


def read_int8(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All weights of the folder in `dtype`, under the names that they are stored under. Raises `ModelError`.

    An error of the disk or of the safetensors library passes.
    """
    path = folder / INT8_WEIGHTS
    weights: dict[str, torch.Tensor] = {}
    with safe_open(path, "pt") as file:
        if file.metadata() != METADATA:
            raise ModelError(f"{path}: not stored by a scheme that this version knows; update guardreasoner-vl")
        names = sorted(file.keys())
        numbers = {name for name in names if file.get_slice(name).get_dtype() == "I8"}
        scaled = {name.removesuffix(SCALE) for name in names if name.endswith(SCALE)}
        if alone := sorted(numbers ^ scaled):
            raise ModelError(
                f"{path}: {len(alone)} weights lack their scales, or scales their weights ({alone[0]:.80}); "
                "download it again"
            )
        for name in names:
            if name in numbers:
                weights[name] = _matrix(path, name, file.get_tensor(name), file.get_tensor(name + SCALE), dtype)
            elif not name.endswith(SCALE):
                weights[name] = file.get_tensor(name).to(dtype, copy=True)  # a view would keep the whole file mapped
    return weights


def _matrix(path: Path, name: str, stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if stored.dim() != 2 or scale.shape != (len(stored), 1) or not scale.isfinite().all():
        raise ModelError(f"{path}: {name:.80} is no matrix with one finite scale per row; download it again")
    return dequantised(stored, scale, dtype)
