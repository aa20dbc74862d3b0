"""Whether a corpus can be trained on as it is: ids, labels, images and reasoning of every row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.corpus.store import read_corpus, read_info
from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import decoded_images
from guardreasoner_vl.protocol import TargetLabel, neutralise, training_target
from guardreasoner_vl.sources.labels import content
from guardreasoner_vl.sources.skipped import SetAside
from guardreasoner_vl.teachers.gates import Rejected, gate

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.types import GoldLabel, Sample


def check_corpus(folder: Path, progress: Callable[[int, int], None] | None = None) -> tuple[int, SetAside]:
    """The number of rows, and every fault by row. Raises `DataError` if there is no corpus."""
    faults = SetAside()
    total = read_info(folder).rows
    seen: set[str] = set()
    labels: dict[object, tuple[GoldLabel | None, GoldLabel | None]] = {}
    rows = 0
    unread = SetAside()
    for sample in read_corpus(folder, unread):
        rows += 1
        for fault in _faults(sample, seen, labels):
            faults.add(fault, sample.id)
        seen.add(sample.id)
        if progress:
            progress(rows, total)
    rows += unread.total
    faults.merge(unread)
    if rows != total:
        faults.add(f"{rows:,} rows, the description says {total:,}", folder.name)
    return rows, faults


def _faults(
    sample: Sample, seen: set[str], labels: dict[object, tuple[GoldLabel | None, GoldLabel | None]]
) -> list[str]:
    found = []
    own = (sample.request_label, sample.response_label)
    if sample.id in seen:
        found.append("its id stands there already")
    if not any(own):
        found.append("no label")
    if sample.response_label and not (sample.response or "").strip():
        found.append("a label of a response that is not there")
    if not sample.images:
        before = labels.setdefault(content(sample), own)
        if any(old and new and old != new for old, new in zip(before, own, strict=True)):
            found.append("contradictory labels")
    for image in sample.images:
        try:
            decoded_images(Path(image))
        except ImageError:
            found.append("unreadable image")
    if sample.reasoning and neutralise(sample.reasoning) != sample.reasoning:
        found.append("reasoning: a marker of the protocol; training breaks it")
    if sample.reasoning and (reason := _rejected(sample)):
        found.append(f"reasoning: {reason}")
    return found


def _rejected(sample: Sample) -> str | None:
    """Why the quality gates would not keep the row's reasoning."""
    words = (
        TargetLabel(sample.request_label or "unharmful") if sample.exchange().has_prompt else TargetLabel("None"),
        TargetLabel(sample.response_label or "unharmful") if sample.exchange().has_response else TargetLabel("None"),
    )
    text = "".join(span.text for span in training_target(neutralise(sample.reasoning or ""), *words))
    judged = gate(text, sample, "stop")
    return judged.reason if isinstance(judged, Rejected) else None
