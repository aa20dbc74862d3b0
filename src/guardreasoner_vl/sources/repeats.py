"""Repeats: a training row appears several times in a list, or once with its count in `meta`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.types import Provenance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.types import Sample


def times(row: Sample) -> int:
    """How often training uses this entry."""
    return row.provenance.repeat


def with_count(row: Sample, count: int) -> Sample:
    """The row, marked to be used `count` times."""
    meta = {name: value for name, value in row.meta.items() if name != "repeat"}
    return row.model_copy(update={"meta": meta}).with_provenance(Provenance(repeat=count))


def all_taken(rows: Sequence[Sample], count: int, *, repeated: bool) -> list[Sample]:
    """Repeat the rows `count` times: in the list if `repeated`, else by the count in `meta`."""
    return list(rows) * count if repeated or count == 1 else [with_count(row, count) for row in rows]
