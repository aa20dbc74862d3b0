"""The clipped objective without KL (docs/method.md, section 5).

    L = -1/N * sum_i 1/|o_i| * sum_t min(K_it A_i, clip(K_it, 1 - B, 1 + B) A_i),   K = exp(logp - logp_old)

Ratios are per token, the mean is per completion, then over the N completions of the update (TRL's `grpo` loss).
The tokens of all completions are concatenated into one dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clipped:
    """`loss` is a scalar; `clipped` (tokens,) marks the tokens whose gradient is zero because of the bound."""

    loss: torch.Tensor
    clipped: torch.Tensor


def clipped_loss(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, weights: torch.Tensor, bound: float
) -> Clipped:
    """The clipped loss; all tensors have the shape (tokens,), `weights` are 1 / (N |o_i|)."""
    ratio = (logprobs - old).exp()
    free, cut = ratio * advantages, ratio.clamp(1 - bound, 1 + bound) * advantages
    loss = -(torch.minimum(free, cut) * weights).sum()
    with torch.no_grad():
        too_high, too_low = (ratio > 1 + bound) & (advantages > 0), (ratio < 1 - bound) & (advantages < 0)
    return Clipped(loss, too_high | too_low)
