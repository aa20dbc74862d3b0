"""Public text sets under open licences: held-out rows to judge, and rows to train the shallow baseline on."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.benchmarks.find import from_samples
from guardreasoner_vl.sources.jsonl import find_split, is_held_out, read_samples
from guardreasoner_vl.sources.skipped import SkippedRows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark
    from guardreasoner_vl.types import Sample

XSTEST = "xstest_prompts"
ASSISTANT = "openassistant_eval_prompts"
"""Harmless questions of real people."""
FIGSTEP = "figstep"
"""Harmful requests rendered as images."""
WHOLE = (XSTEST, ASSISTANT, FIGSTEP)
"""Validation sets that are judged whole, so that their figures can be compared with others."""
OPEN_PARTS = {
    "guardreasonertrain_5k_prompts": ("WildGuardTrainR", "AegisTrainR"),
    "benign_text": ("dolly-closed-qa", "self-instruct-user"),
}
"""Sources with several licences: the values of `source` whose rows have an open licence."""
TRAINED_ON = 3000
"""Maximum rows per source to train the baseline on, so that no set dominates."""


@dataclass
class PublicSets:
    """Benchmarks of text rows, rows to train hashed n-grams on, and FigStep if it is available."""

    loaded: list[LoadedBenchmark] = field(default_factory=list)
    train: list[Sample] = field(default_factory=list)
    figstep: LoadedBenchmark | None = None


def public_sets(data: Path, rows: int) -> PublicSets:
    """At most `rows` held-out text rows of every open source, and the validation sets whole.

    `data` has one folder for each source and a `manifest.csv` with the columns source, file and use. Rows with doubtful
    labels (`meta.weak`) are left out. The draw depends on the ids alone. Raises `DataError`.
    """
    sets = PublicSets()
    for source in _sources(data):
        samples = list(_labelled(data / source, source))
        if source in WHOLE:
            judged = samples
        else:
            judged = drawn([row for row in samples if is_held_out(row.id)], rows)
            sets.train += drawn([row for row in samples if not is_held_out(row.id)], TRAINED_ON)
        if not judged:
            continue
        loaded = from_samples(source, judged, data / source, SkippedRows())
        if source == FIGSTEP:
            sets.figstep = loaded
        else:
            sets.loaded.append(loaded)
    if not sets.loaded:
        raise DataError(f"{data}: no held-out text row of an open source in it; give the folder of the data sets")
    return sets


def held_out(data: Path) -> Iterator[Sample]:
    """All held-out text rows of the open sources, none of `WHOLE`. Raises `DataError` as `public_sets` does."""
    for source in _sources(data):
        if source not in WHOLE:
            yield from (row for row in _labelled(data / source, source) if is_held_out(row.id))


def drawn(rows: Iterable[Sample], count: int) -> list[Sample]:
    """At most `count` rows by their ids' digests: adding rows to the source changes few of the sampled ones."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"quality-{row.id}".encode()).digest())[:count]


def _sources(data: Path) -> list[str]:
    """The folders to read, in the manifest's order."""
    path = data / "manifest.csv"
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            lines = list(csv.DictReader(stream))
        names = [line["source"] for line in lines if _is_open(line)]
    except (OSError, KeyError, csv.Error) as error:
        raise DataError(f"{path}: no list of sources with their use; give the folder that holds it") from error
    return list(dict.fromkeys(names))


def _is_open(line: dict[str, str]) -> bool:
    wanted = "validation" if line["source"] in WHOLE else "train"
    return line["file"].startswith(f"{wanted}.") and (line["use"] == "open" or line["source"] in OPEN_PARTS)


def _labelled(folder: Path, source: str) -> Iterator[Sample]:
    """The rows that may be judged or trained on."""
    modality = "text-image" if source == FIGSTEP else "text"
    for row in read_samples(find_split(folder, "validation" if source in WHOLE else "train"), SkippedRows()):
        is_labelled = row.request_label is not None or row.response_label is not None
        is_open = source not in OPEN_PARTS or row.source in OPEN_PARTS[source]
        if row.modality == modality and is_labelled and is_open and not row.provenance.weak:
            yield row
