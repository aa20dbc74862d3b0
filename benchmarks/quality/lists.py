"""The request lists, which no guard is trained on: text files with one request per line, below its [kind]."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from guardreasoner_vl.evaluation.benchmarks.find import from_samples
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.types import Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark
    from guardreasoner_vl.types import GoldLabel

ListName = Literal["everyday", "harmful"]
LABELS: dict[ListName, GoldLabel] = {"everyday": "unharmful", "harmful": "harmful"}
FOLDER = Path(__file__).parent
SENTENCES = FOLDER / "sentences.txt"
AROUND = 8
"""Harmless sentences around a request."""
PLACES = ("before", "after", "around")

_Row = TypeVar("_Row")


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The (kind, text) of each line; `\\n` in a line is a line break. Raises `ValueError` for a text without a kind."""
    lines: list[tuple[str, str]] = []
    kind = ""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("[") and line.endswith("]"):
            kind = line[1:-1]
        elif line and not line.startswith("#"):
            if not kind:
                raise ValueError(f"{path.name}: the first line of text has no [kind] above it; add one")
            lines.append((kind, line.replace("\\n", "\n")))
    return lines


def request_list(name: ListName, count: int | None = None) -> LoadedBenchmark:
    """The list as a benchmark, or `count` of its rows, evenly spread over the file; a row's category is its kind."""
    path = FOLDER / f"{name}.txt"
    rows = [
        Sample(
            id=f"{name}-{number:03d}",
            source=name,
            split="test",
            modality="text",
            prompt=text,
            request_label=LABELS[name],
            meta={"category": kind},
        )
        for number, (kind, text) in enumerate(read_lines(path), 1)
    ]
    return from_samples(name, rows if count is None else spread(rows, count), path, SkippedRows())


def spread(rows: Sequence[_Row], count: int) -> list[_Row]:
    """`count` rows at equal distances; all rows if there are not more."""
    return list(rows) if count >= len(rows) else [rows[place * len(rows) // count] for place in range(count)]


def surrounded(loaded: LoadedBenchmark, place: str) -> LoadedBenchmark:
    """The rows with eight harmless sentences before, after or around their text, deterministic by id."""
    sentences = [text for _, text in read_lines(SENTENCES)]
    rows = []
    for row in loaded.samples:
        rng = random.Random(f"{place}-{row.id}")
        drawn = rng.sample(sentences, AROUND)
        first = {"before": AROUND, "after": 0, "around": AROUND // 2}[place]
        parts = (" ".join(drawn[:first]), row.prompt, " ".join(drawn[first:]))
        rows.append(row.model_copy(update={"prompt": rng.choice((" ", "\n\n")).join(part for part in parts if part)}))
    return from_samples(loaded.benchmark.name, rows, loaded.path, SkippedRows())
