"""How often training takes a row: rows that stand several times, or once with a number in `meta`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.types import Sample

REPEAT = "repeat"
"""The field of `meta` that says how often training takes a row."""


def times(row: Sample) -> int:
    """How often training takes the row where it stands."""
    return int(row.meta.get(REPEAT, 1))


def taken(row: Sample, count: int) -> Sample:
    """The row, to be taken `count` times where it stands."""
    meta = {name: value for name, value in row.meta.items() if name != REPEAT}
    return row.model_copy(update={"meta": meta if count == 1 else {**meta, REPEAT: count}})


def all_taken(rows: Sequence[Sample], count: int, *, repeated: bool) -> list[Sample]:
    """The rows `count` times: each that often in the list if `repeated`, else once with the number in `meta`."""
    return list(rows) * count if repeated or count == 1 else [taken(row, count) for row in rows]
