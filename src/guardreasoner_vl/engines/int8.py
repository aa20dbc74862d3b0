"""Weights stored in half the space: each row of a matrix as int8 numbers and one scale, everything else in bf16.

    s = max|w| / 127 over a row,   q = round(w / s),   w' = q s        so that |w - w'| <= s / 2

This is absmax quantisation (arXiv 2208.07339, section 2.1) of storage only: the network computes with w'.

The file is a safetensors file, but not under the name that transformers looks for: a tool that does not know the scheme
would silently use q as the weights. Matrices keep their names; the scale of matrix `NAME` is `NAME.scale`.
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
"""The file's metadata. With a second key the bytes would vary, because safetensors writes keys in random order."""

_HIGHEST = 127
_AT_ONCE = 1 << 15  # weights; torch splits larger operations among threads, which takes seconds when the cores are busy


def is_int8(folder: Path) -> bool:
    """Whether a model folder's weights are stored in int8."""
    return (folder / INT8_WEIGHTS).is_file()


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 numbers of a matrix of shape (rows, columns), and its rows' bf16 scales of shape (rows, 1)."""
    weight = weight.float()
    scale = (weight.abs().amax(1, keepdim=True) / _HIGHEST).to(torch.bfloat16)
    scale = scale.clamp_min(torch.finfo(torch.bfloat16).tiny)  # a row of zeros
    return (weight / scale.float()).round().to(torch.int8), scale  # bf16 lowers a scale by 1/256 at most: 127.496


def dequantised(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix of shape (rows, columns) in `dtype`, computed in fp32."""
    weight, scale = torch.empty(stored.shape, dtype=dtype), scale.float()
    step = max(1, _AT_ONCE // stored.shape[1])
    for start in range(0, len(stored), step):
        rows = slice(start, start + step)
        torch.mul(stored[rows], scale[rows], out=weight[rows])
    return weight


def read_int8(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All weights of the folder in `dtype`, by their stored names. Raises `ModelError`.

    Errors of the disk and of the safetensors library are passed on.
    """
    path = folder / INT8_WEIGHTS
    weights: dict[str, torch.Tensor] = {}
    with safe_open(path, "pt") as file:
        if file.metadata() != METADATA:
            raise ModelError(f"{path}: stored in a format that this version does not know; update guardreasoner-vl")
        names = sorted(file.keys())
        numbers = {name for name in names if file.get_slice(name).get_dtype() == "I8"}
        scaled = {name.removesuffix(SCALE) for name in names if name.endswith(SCALE)}
        if unpaired := sorted(numbers ^ scaled):
            raise ModelError(
                f"{path}: {len(unpaired)} weights without a scale or scales without a weight ({unpaired[0]:.80}); "
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
        raise ModelError(f"{path}: {name:.80} is not a matrix with one finite scale per row; download it again")
    return dequantised(stored, scale, dtype)
