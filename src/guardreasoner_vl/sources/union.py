"""What the labels of several rows say about the row that is made of them (paper, section 3.3; method, section 4).

    label = harmful if any is; unharmful if all are; else unknown        for request and response alike

A row without a request (or response) has nothing there that could be judged, so the others' labels stand: absent
is not unknown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from guardreasoner_vl.types import GoldLabel, Sample, Target


def union_label(rows: Iterable[Sample], target: Target) -> GoldLabel | None:
    """The union rule; None where a label that would decide is unknown, and where there is nothing to judge."""
    labels = [label for row in rows for label in _labels(row, target)]
    if "harmful" in labels:
        return "harmful"
    return "unharmful" if labels and None not in labels else None


def class_of(row: Sample) -> GoldLabel | None:
    """Harmful if anything in it is; None without a label."""
    labels = {*_labels(row, "request"), *_labels(row, "response")} - {None}
    return None if not labels else "harmful" if "harmful" in labels else "unharmful"


def made_for(rows: int, share: float) -> int:
    """How many made rows are `share` of a set that holds them and `rows` others."""
    return round(rows * share / (1 - share))


def _labels(row: Sample, target: Target) -> tuple[GoldLabel | None, ...]:
    """The row's label, known or not; nothing where there is nothing to judge."""
    if target == "request":
        return (row.request_label,) if row.prompt.strip() or row.images else ()
    return (row.response_label,) if row.response and row.response.strip() else ()
