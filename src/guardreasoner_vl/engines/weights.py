"""Loads a model folder's weights as a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from guardreasoner_vl.engines.int8 import is_int8, read_int8
from guardreasoner_vl.errors import ModelError, reason_of

if TYPE_CHECKING:
    from pathlib import Path

DType = Literal["auto", "bf16", "fp32"]


def load_network(folder: Path, dtype: DType = "auto") -> Any:
    """The network in evaluation mode, on the GPU if there is one. Raises `ModelError` as `read_network` does."""
    return read_network(folder, chosen_dtype(dtype)).to(_device()).eval()


def read_network(folder: Path, dtype: torch.dtype) -> Any:
    """The network with its weights in `dtype`, whatever the stored format. Raises `ModelError`.

    Weights that are broken or incomplete are refused; missing ones are never initialised at random.
    """
    try:
        network, info = _from_int8(folder, dtype) if is_int8(folder) else _from_pretrained(folder, dtype)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{folder}: cannot be loaded ({reason_of(error)}); download it again") from error
    missing = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights are missing or of another shape ({missing[0]:.80}); download it again"
        )
    return network


def _from_pretrained(folder: Path, dtype: torch.dtype) -> Any:
    """The network, and the report of transformers about its weights."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )


def _from_int8(folder: Path, dtype: torch.dtype) -> Any:
    """`_from_pretrained` for int8 weights: this package reads them, transformers maps their names."""
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        None,
        config=str(folder),
        generation_config=GenerationConfig.from_pretrained(folder, local_files_only=True),
        state_dict=read_int8(folder, dtype),
        dtype=dtype,
        local_files_only=True,
        output_loading_info=True,
    )
    loaded[0].config.name_or_path = str(folder)  # a trainer reads it as the base model's name
    return loaded


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen_dtype(name: DType, device: str | None = None) -> torch.dtype:
    """The dtype that `name` means; for `auto` the result of `computing_dtype`."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    return computing_dtype(device)


def computing_dtype(device: str | None = None) -> torch.dtype:
    """bf16 if the device computes in it, else fp32; the default device is the GPU, or the CPU without one."""
    if (device or _device()) == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capable = torch.cpu.get_capabilities()
    return torch.bfloat16 if capable.get("avx512_bf16") or capable.get("amx_bf16") else torch.float32
