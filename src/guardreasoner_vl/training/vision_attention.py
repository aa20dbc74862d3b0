"""Attention of the vision tower in one call for all windows, instead of one call for each.

Without flash-attention transformers computes every window of every image by itself: thousands of small calls in a batch
of images, which leave a GPU idle. Here windows are padded to the longest one, and padding is masked, unless that would
more than double the work. The result is the same up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
    is_flash_attention_requested,
)

MOST_PADDED = 2
"""Windows are computed one by one if padding them all would take more than this many times their own work."""


def use_one_call(tower: Any) -> None:
    """Switch a Qwen2.5-VL's vision tower to this attention, in place, unless it has flash-attention."""
    if not is_flash_attention_requested(tower.config):
        for block in tower.blocks:
            block.attn.__class__ = OneCallAttention


@dataclass(frozen=True)
class AttentionWindows:
    """Places of the windows' patches.

    `gather` (windows, longest) are the patches' indices, padded at the ends; `mask` (windows, 1, 1, longest) is True
    for patches and `real` are the flat indices of patches, both None if there is no padding.
    """

    gather: torch.Tensor
    mask: torch.Tensor | None
    real: torch.Tensor | None

    @classmethod
    def of(cls, bounds: torch.Tensor) -> AttentionWindows | None:
        """The places between `bounds` (windows + 1,), or None if there would be too much padding.

        They are computed once for all layers that share this tensor.
        """
        if not hasattr(bounds, "_windows"):
            bounds._windows = cls._between(bounds)  # type: ignore[attr-defined]
        windows: AttentionWindows | None = getattr(bounds, "_windows", None)
        return windows

    @classmethod
    def _between(cls, bounds: torch.Tensor) -> AttentionWindows | None:
        lengths = bounds.diff()
        longest = int(lengths.max())
        if len(lengths) * longest**2 > MOST_PADDED * int(lengths.square().sum()):
            return None
        steps = torch.arange(longest, device=bounds.device)
        inside = steps < lengths[:, None]
        gather = bounds[:-1, None] + steps.minimum(lengths[:, None] - 1)
        if bool(inside.all()):
            return cls(gather, None, None)
        return cls(gather, inside[:, None, None], inside.flatten().nonzero()[:, 0])


class OneCallAttention(Qwen2_5_VLVisionAttention):  # type: ignore[misc]
    """Attention within windows, all in one call."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **others: Any,
    ) -> torch.Tensor:
        """(patches, width) -> (patches, width); `cu_seqlens` are the windows' bounds."""
        windows = AttentionWindows.of(cu_seqlens)
        if windows is None:
            stock: torch.Tensor = super().forward(
                hidden_states, cu_seqlens, position_embeddings=position_embeddings, **others
            )
            return stock
        patches = hidden_states.shape[0]
        query, key, value = self.qkv(hidden_states).view(patches, 3, self.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (states[windows.gather].transpose(1, 2) for states in (query, key, value))
        attended = scaled_dot_product_attention(query, key, value, attn_mask=windows.mask, scale=self.scaling)
        outputs = attended.transpose(1, 2).flatten(0, 1).flatten(1)
        return self.proj(outputs if windows.real is None else outputs[windows.real])  # type: ignore[no-any-return]
