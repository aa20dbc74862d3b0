"""Rows of a recipe's sources: filtered, limited, repeated, and split from the held-out ones."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.sources.drawn import draw_folder
from guardreasoner_vl.sources.jsonl import find_split, is_held_out, read_samples
from guardreasoner_vl.sources.set_aside import SetAside

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from guardreasoner_vl.recipe import DataSection, DrawnSection, SourceSection
    from guardreasoner_vl.types import Sample


@dataclass
class Mixture:
    """Training rows, repeats included, and the rows never trained on; `set_aside` counts unusable ones."""

    train: list[Sample] = field(default_factory=list)
    held_out: list[Sample] = field(default_factory=list)
    set_aside: SetAside = field(default_factory=SetAside)


def build_mixture(data: DataSection, root: Path, work: Path, seed: int) -> Mixture:
    """Read every source below `root`; drawn pictures are made in `work` once and found there again."""
    mixture = Mixture()
    for source in data.sources:
        rng = random.Random(f"{seed}-{source.folder}")
        kept, held_out = _split(_rows(source, root, mixture.set_aside))
        if not (kept or held_out):
            raise DataError(f"{root / source.folder}: no row passes the recipe's `only`; correct it or drop the source")
        kept = [row for row in kept if not row.meta.get("weak") or rng.random() < source.weak_share]
        if source.limit is not None and len(kept) > source.limit:
            kept = rng.sample(kept, source.limit)
        mixture.train += kept * source.repeat
        mixture.held_out += held_out
    if data.drawn is not None and set(data.modalities) != {"text"}:
        kept, held_out = _split(read_samples(_drawn(work, data.drawn, seed)))
        mixture.train += kept * data.drawn.repeat
        mixture.held_out += held_out
    mixture.train = [row for row in mixture.train if row.modality in data.modalities]
    mixture.held_out = [row for row in mixture.held_out if row.modality in data.modalities]
    return mixture


def _drawn(work: Path, drawn: DrawnSection, seed: int) -> Path:
    folder = work / f"drawn-{drawn.count}-{seed}"
    path = folder / "train.jsonl"
    return path if path.is_file() else draw_folder(folder, drawn.count, seed)


def _split(rows: Iterable[Sample]) -> tuple[list[Sample], list[Sample]]:
    kept: list[Sample] = []
    held_out: list[Sample] = []
    for row in rows:
        (held_out if is_held_out(row.id) else kept).append(row)
    return kept, held_out


def _rows(source: SourceSection, root: Path, set_aside: SetAside) -> Iterator[Sample]:
    for row in read_samples(find_split(root / source.folder, "train"), set_aside):
        if all(str(row.meta.get(key, getattr(row, key, ""))) in values for key, values in source.only.items()):
            yield described(row, source)


def described(row: Sample, source: SourceSection) -> Sample:
    """The row under its folder's name, with what is known about its picture's words."""
    meta = dict(row.meta)
    if row.images and source.picture:
        meta["picture"] = source.picture
    if row.images and source.picture_text:
        meta["picture_text"] = meta.get(source.picture_text) or ""
    return row.model_copy(update={"source": source.folder, "meta": meta})
