"""The gap between the sampler's and the trainer's probabilities of the same tokens, and its correction.

    d_t = logp_old_t - logp_sampler_t              old: the trainer's model with the weights that the sampler has
    w_t = min(exp(d_t), C)                         truncated importance weights: each factor of the loss of token t
    effective sample size = (sum exp(d_t))^2 / (n sum exp(d_t)^2), between 0 and 1

An engine such as vLLM computes other log-probabilities than the trainer from the same weights (kernels, bf16), so its
samples are slightly off-policy. Truncated importance sampling (TIS): Yao et al. 2025, "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SamplerGap:
    """Mean and 99th percentile (nearest rank) of |d_t|, and the effective sample size as a share of the tokens."""

    mean: float
    p99: float
    effective: float


def importance_weights(difference: torch.Tensor, cap: float) -> torch.Tensor:
    """w_t from d_t, both of shape (tokens,)."""
    return difference.exp().clamp(max=cap)


def sampler_gap(difference: torch.Tensor) -> SamplerGap:
    """The figures of d_t (tokens,), at least one token."""
    values = difference.double()
    sizes = values.abs().sort().values
    ratio = (values - values.max()).exp()  # the share does not depend on a common factor, and this one cannot overflow
    effective = ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())
    return SamplerGap(float(sizes.mean()), float(sizes[math.ceil(0.99 * len(sizes)) - 1]), float(effective))
