"""The union rule: the label of a row that is made of several rows (paper, section 3.3; docs/method.md, section 4).

    label = harmful if any is; unharmful if all are; else unknown        for request and response alike

A row without a request (or response) does not take part, so the other rows decide: an absent part is not an unknown
label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from guardreasoner_vl.types import GoldLabel, Sample, Target


def union_label(rows: Iterable[Sample], target: Target) -> GoldLabel | None:
    """The union rule; None if an unknown label could change the result, or if no row has this part."""
    labels = [label for row in rows for label in _labels_of_part(row, target)]
    if "harmful" in labels:
        return "harmful"
    return "unharmful" if labels and None not in labels else None


def class_of(row: Sample) -> GoldLabel | None:
    """`harmful` if a label of the row is, else `unharmful`; None without any label."""
    labels = {*_labels_of_part(row, "request"), *_labels_of_part(row, "response")} - {None}
    return None if not labels else "harmful" if "harmful" in labels else "unharmful"


def made_for(rows: int, share: float) -> int:
    """How many rows to make, so that they are `share` of a set with `rows` other rows."""
    return round(rows * share / (1 - share))


def _labels_of_part(row: Sample, target: Target) -> tuple[GoldLabel | None, ...]:
    """The row's label, None if unknown; an empty tuple if the row lacks this part."""
    if target == "request":
        return (row.request_label,) if row.has_request else ()
    return (row.response_label,) if row.has_response else ()
