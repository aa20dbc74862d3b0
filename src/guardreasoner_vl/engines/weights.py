"""A folder's weights as a network in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from guardreasoner_vl.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

DType = Literal["auto", "bf16", "fp32"]


def load_network(folder: Path, dtype: DType = "auto") -> Any:
    """The network, ready to answer, on the GPU if there is one. Raises `ModelError`.

    A folder whose weights are broken or do not fill the network is refused, never filled up at random.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        network, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=_dtype(dtype, device), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{folder}: cannot be loaded ({reason}); download it again") from error
    lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if lacking:
        raise ModelError(
            f"{folder}: {len(lacking)} weights are missing or of another shape ({lacking[0]:.80}); download it again"
        )
    return network.to(device).eval()


def _dtype(wanted: DType, device: str) -> torch.dtype:
    """bf16 where the hardware computes in it, else fp32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bf16" else torch.float32
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capable = torch.cpu.get_capabilities()
    return torch.bfloat16 if capable.get("avx512_bf16") or capable.get("amx_bf16") else torch.float32
