"""Dynamic clipping: the bound B_s of the ratio at rollout batch s of s_total, s from 1 (docs/method.md, section 5).

    product    B_s = eps * prod_{i=1..s} (s_total - i) / s_total      as published; 0 at the end
    linear     B_s = eps * (s_total - s) / s_total
    cosine     B_s = eps * (1 + cos(pi * s / s_total)) / 2
    constant   B_s = eps

never below `floor`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guardreasoner_vl.recipe import ClipSection


def bound(section: ClipSection, s: int, total: int) -> float:
    """B_s; raises `ValueError` outside of 1 <= s <= total."""
    if not 1 <= s <= total:
        raise ValueError(f"rollout batch {s} of {total}: count from 1 to the last")
    match section.schedule:
        case "product":
            share = math.prod((total - i) / total for i in range(1, s + 1))
        case "linear":
            share = (total - s) / total
        case "cosine":
            share = (1 + math.cos(math.pi * s / total)) / 2
        case "constant":
            share = 1.0
    return max(section.floor, section.epsilon * share)
