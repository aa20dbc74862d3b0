"""Advantages within a group (docs/method.md, section 5).

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)

The constant 1e-4 and the sample standard deviation (n - 1) are TRL's; a group of equal rewards has advantages of zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EPSILON = 1e-4


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Advantages (groups, G) from rewards (groups, G), G at least 2.

    Raises `FloatingPointError` if a reward is NaN or infinite.
    """
    if not rewards.isfinite().all():
        raise FloatingPointError("a reward is NaN or infinite: check grpo.reward.min_length and grpo.reward.form")
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = centred / (rewards.std(1, keepdim=True) + EPSILON)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)  # else the mean's rounding error would remain
    return advantages.masked_fill(equal, 0.0)
