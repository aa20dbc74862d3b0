"""The rows of a recipe's sources: filtered, sampled, repeated, and split into training, validation and test rows."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError, RecipeError
from guardreasoner_vl.recipe import SAMPLES
from guardreasoner_vl.sources.adapters import read_source
from guardreasoner_vl.sources.catalogue import adapter_named
from guardreasoner_vl.sources.categories import taxonomy
from guardreasoner_vl.sources.joined import joined_rows
from guardreasoner_vl.sources.jsonl import find_split, is_held_out, read_samples
from guardreasoner_vl.sources.labels import KnownLabels, known_labels
from guardreasoner_vl.sources.locate import locate
from guardreasoner_vl.sources.parquet import IMAGES, read_parquet
from guardreasoner_vl.sources.rendered import SOURCE as RENDERED
from guardreasoner_vl.sources.rendered import rendered_rows
from guardreasoner_vl.sources.repeats import all_taken
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.sources.synthetic import contrast
from guardreasoner_vl.sources.synthetic import exchanges as written
from guardreasoner_vl.sources.synthetic.images import draw_folder
from guardreasoner_vl.sources.variation import varied
from guardreasoner_vl.types import Provenance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from guardreasoner_vl.recipe import DataSection, MadeSection, SourceSection
    from guardreasoner_vl.types import Sample


@dataclass
class Mixture:
    """Training rows with repeats, rows that are never trained on, and the unusable rows in `skipped`.

    `held_out` has the validation rows (the `validation_share` of every source), `test` the shares set by `test_share`.
    """

    train: list[Sample] = field(default_factory=list)
    held_out: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    skipped: SkippedRows = field(default_factory=SkippedRows)


def build_mixture(data: DataSection, root: Path, work: Path, seed: int, *, curated: bool = False) -> Mixture:
    """Read every source below `root`; synthetic and unpacked images are written to `work` once and reused.

    With `curated`, each training row appears once with its number of repeats in `meta`, and rendered rows, joined rows
    and variations are left to `extended`: before deduplication they would hide overlaps with the evaluation sets.
    Raises `DataError` if `root` is no folder or a source cannot be read.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give as --data the folder that holds the recipe's sources")
    mixture = Mixture()
    for source in data.sources:
        rng = random.Random(f"{seed}-{source.title}")
        read = _source_rows(source, root, work, mixture.skipped)
        kept, held_out, test = _split_rows(read, source.test_share, data.validation_share, seed)
        if not (kept or held_out or test):
            raise DataError(
                f"{source.folder}: no row passes the recipe's `only`; correct the filter or remove the source"
            )
        kept = [row for row in kept if not row.provenance.weak or rng.random() < source.weak_share]
        if source.share < 1:
            kept = [row for row in kept if rng.random() < source.share]
        if source.limit is not None and len(kept) > source.limit:
            kept = rng.sample(kept, source.limit)
        mixture.train += all_taken(kept, source.repeat, repeated=not curated)
        mixture.held_out += held_out
        mixture.test += test
    images = None if set(data.modalities) == {"text"} else data.synthetic_images
    folders = (
        (images, "drawn", draw_folder),
        (data.synthetic_exchanges, "written", written.write_folder),
        (data.contrast, "contrast", contrast.write_folder),
    )
    for section, name, make in folders:
        if section is not None:
            path = _synthetic_rows(work, name, section, make, seed)
            kept, held_out, test = _split_rows(read_samples(path), section.test_share, data.validation_share, seed)
            mixture.train += all_taken(kept, section.repeat, repeated=not curated)
            mixture.held_out += held_out
            mixture.test += test
    for name in ("train", "held_out", "test"):
        rows: list[Sample] = getattr(mixture, name)
        setattr(mixture, name, [_with_taxonomy(row, data) for row in rows if row.modality in data.modalities])
    if not curated:
        mixture.train = extended(mixture.train, data, work, seed)
    return mixture


def extended(train: list[Sample], data: DataSection, work: Path, seed: int) -> list[Sample]:
    """The training rows plus rendered and joined rows, with some texts varied; each only if the recipe asks for it.

    The rendered rows' images are drawn below `work`.
    """
    derived: list[Sample] = []
    if data.rendered:
        derived += rendered_rows(train, data.rendered, work / RENDERED, seed, data.modalities)
    if data.joined:
        derived += joined_rows(train, data.joined, seed)
    train = [*train, *derived]
    return varied(train, data.varied, seed) if data.varied else train


def _with_taxonomy(row: Sample, data: DataSection) -> Sample:
    """The row with `meta.taxonomy` set from its category, if it has one."""
    category = row.provenance.category
    if not category:
        return row
    return row.with_provenance(Provenance(taxonomy=taxonomy(category, data.categories)))


def _synthetic_rows(
    work: Path, name: str, section: MadeSection, make: Callable[[Path, int, int], Path], seed: int
) -> Path:
    folder = work / f"{name}-{section.count}-{seed}"
    path = folder / "train.jsonl"
    return path if path.is_file() else make(folder, section.count, seed)


def _split_rows(
    rows: Iterable[Sample], test_share: float, validation_share: float | None, seed: int
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Split rows into training, held-out and test rows, by their ids alone."""
    kept: list[Sample] = []
    held_out: list[Sample] = []
    test: list[Sample] = []
    for row in rows:
        if _chance(row.id, "test", seed) < test_share:
            test.append(row)
        elif _validates(row.id, validation_share, seed):
            held_out.append(row)
        else:
            kept.append(row)
    return kept, held_out, test


def _validates(name: str, share: float | None, seed: int) -> bool:
    return is_held_out(name) if share is None else _chance(name, "validation", seed) < share


def _chance(name: str, split: str, seed: int) -> float:
    """A number in [0, 1) derived from the id, the split and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}-{split}-{name}".encode()).digest()[:8]) / 2**64


def _source_rows(source: SourceSection, root: Path, work: Path, skipped: SkippedRows) -> Iterator[Sample]:
    known = _labels_from(source, root, work)
    for row in _read_section(source, root, work, skipped):
        if all(str(row.meta.get(key, getattr(row, key, ""))) in values for key, values in source.only.items()):
            yield described(known.applied(row) if known else row, source)


def _read_section(source: SourceSection, root: Path, work: Path, skipped: SkippedRows) -> Iterator[Sample]:
    if source.adapter != SAMPLES:
        adapter = adapter_named(source.adapter)
        folder = locate(source.folder, root, adapter)
        return read_source(adapter, folder, work / IMAGES / source.title, skipped)
    folder = locate(source.folder, root)
    parquet = sorted(folder.glob("train*.parquet"))
    if parquet:
        return (row for path in parquet for row in read_parquet(path, skipped))
    return read_samples(find_split(folder, "train"), skipped)


def _labels_from(source: SourceSection, root: Path, work: Path) -> KnownLabels | None:
    """Labels of the same content in the data set `labels_from`; None if the source names none."""
    if source.labels_from is None:
        return None
    adapter = adapter_named("guardreasoner-vltrain")
    folder = locate(source.labels_from, root, adapter)
    known = known_labels(read_source(adapter, folder, work / IMAGES / adapter.name, SkippedRows()))
    if not known.labels:
        raise RecipeError(f"{source.labels_from}: no labelled row in it; correct labels_from")
    return known


def described(row: Sample, source: SourceSection) -> Sample:
    """The row with its source's title, and the source's image kind and image text in `meta`."""
    titled = row.model_copy(update={"source": source.title})
    if not row.images:
        return titled
    text = str(row.meta.get(source.image_text) or "") if source.image_text else None
    return titled.with_provenance(Provenance(image_kind=source.image_kind or None, image_text=text))
