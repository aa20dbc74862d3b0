"""Check that a corpus can be trained on: ids, labels, images and reasoning of every row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.corpus.store import read_corpus, read_info
from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import decoded_images
from guardreasoner_vl.protocol import TargetLabel, neutralise, training_target
from guardreasoner_vl.sources.labels import content_key
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.teachers.gates import RejectedAnswer, gate

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.types import GoldLabel, Sample


def check_corpus(folder: Path, progress: Callable[[int, int], None] | None = None) -> tuple[int, SkippedRows]:
    """The number of rows, and the faults with their row ids. Raises `DataError` if there is no corpus."""
    faults = SkippedRows()
    total = read_info(folder).rows
    ids: set[str] = set()
    labels: dict[object, tuple[GoldLabel | None, GoldLabel | None]] = {}
    rows = 0
    unread = SkippedRows()
    for sample in read_corpus(folder, unread):
        rows += 1
        for fault in _faults(sample, ids, labels):
            faults.add(fault, sample.id)
        ids.add(sample.id)
        if progress:
            progress(rows, total)
    rows += unread.total
    faults.merge(unread)
    if rows != total:
        faults.add(f"{rows:,} rows, but corpus.json says {total:,}", folder.name)
    return rows, faults


def _faults(
    sample: Sample, ids: set[str], labels: dict[object, tuple[GoldLabel | None, GoldLabel | None]]
) -> list[str]:
    faults = []
    known = (sample.request_label, sample.response_label)
    if sample.id in ids:
        faults.append("repeated id")
    if not any(known):
        faults.append("no label")
    if sample.response_label and not sample.has_response:
        faults.append("a response label without a response")
    if not sample.images:
        before = labels.setdefault(content_key(sample), known)
        if any(old and new and old != new for old, new in zip(before, known, strict=True)):
            faults.append("contradictory labels")
    for image in sample.images:
        try:
            decoded_images(Path(image))
        except ImageError:
            faults.append("unreadable image")
    if sample.reasoning and neutralise(sample.reasoning) != sample.reasoning:
        faults.append("reasoning: contains a protocol marker, which training neutralises")
    if sample.reasoning and (reason := _rejected(sample)):
        faults.append(f"reasoning: {reason}")
    return faults


def _rejected(sample: Sample) -> str | None:
    """Why the quality gates reject the row's reasoning; None if they accept it."""
    words = (
        TargetLabel(sample.request_label or "unharmful") if sample.has_request else TargetLabel("None"),
        TargetLabel(sample.response_label or "unharmful") if sample.has_response else TargetLabel("None"),
    )
    text = "".join(span.text for span in training_target(neutralise(sample.reasoning or ""), *words))
    judged = gate(text, sample, "stop")
    return judged.reason if isinstance(judged, RejectedAnswer) else None
