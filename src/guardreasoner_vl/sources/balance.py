"""Balance classes and modalities by dropping rows at random."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from guardreasoner_vl.recipe import BalanceSection
    from guardreasoner_vl.types import Sample


def balanced(rows: Sequence[Sample], section: BalanceSection, seed: int) -> list[Sample]:
    """The largest subset of `rows`, in their order, with the wanted shares; unlabelled rows count by modality only."""
    rng = random.Random(f"{seed}-balance")
    kept = list(rows)
    if section.harmful is not None:
        shares = {"harmful": section.harmful, "unharmful": 1 - section.harmful}
        for modality in dict.fromkeys(row.modality for row in kept):
            same_modality = [row for row in kept if row.modality == modality]
            drawn = {id(row) for row in _draw_shares(same_modality, _class, shares, rng)}
            kept = [row for row in kept if row.modality != modality or _class(row) is None or id(row) in drawn]
    if section.modalities:
        drawn = {id(row) for row in _draw_shares(kept, lambda row: row.modality, section.modalities, rng)}
        kept = [row for row in kept if id(row) in drawn]
    return kept


def _class(row: Sample) -> str | None:
    """`harmful` if either label is, else `unharmful`; None without a label."""
    labels = {row.request_label, row.response_label} - {None}
    return None if not labels else "harmful" if "harmful" in labels else "unharmful"


def _draw_shares(
    rows: Sequence[Sample],
    key: Callable[[Sample], str | None],
    shares: Mapping[Any, float],
    rng: random.Random,
) -> list[Sample]:
    """Draw the most rows whose keys have these shares; a key without rows does not limit the others."""
    groups = {name: [row for row in rows if key(row) == name] for name in shares}
    present = {name: len(group) for name, group in groups.items() if group}
    if not present:
        return []
    whole = min(count / shares[name] for name, count in present.items())
    return [
        row for name in present for row in rng.sample(groups[name], min(present[name], round(whole * shares[name])))
    ]
