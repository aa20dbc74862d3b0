"""A benchmark: what it is, where it comes from, and how its records become `Sample`s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal, TypeAlias

from guardreasoner_vl.errors import DataError, GuardError
from guardreasoner_vl.sources.jsonl import SetAside
from guardreasoner_vl.sources.records import Record, read_records
from guardreasoner_vl.types import GoldLabel, Modality, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Judged = Literal["prompt", "response", "both"]


class NotASampleError(DataError):
    """A record that cannot be used; its text is the short reason that is counted."""


@dataclass(frozen=True)
class Place:
    """Where a record stands: its benchmark, its number in the files, and the folder that picture paths start from.

    Pictures that stand in the record itself are written to `unpacked`.
    """

    benchmark: str
    number: int
    folder: Path
    unpacked: Path

    @property
    def id(self) -> str:
        """An id of our own, since most sets have none or repeat it."""
        return f"{self.benchmark}/{self.number}"


ToSample: TypeAlias = Callable[[Record, Place], "Sample | Sequence[Sample] | None"]
"""Raises `NotASampleError` for a record that breaks its layout; None for one that the benchmark leaves out."""


@dataclass(frozen=True)
class Layout:
    """One published form: the file (or a pattern for several) below the given folder, and what makes samples of it.

    `pick` chooses among all samples where the set is drawn from a larger file.
    """

    file: str
    to_sample: ToSample
    pick: Callable[[Sequence[Sample]], Sequence[Sample]] | None = None


@dataclass(frozen=True)
class Benchmark:
    """A labelled set. `size` is the official number of rows, `note` what its labels leave open."""

    name: str
    judged: Judged
    modality: Modality
    size: int | None
    licence: str
    origin: str
    layouts: tuple[Layout, ...]
    note: str = ""


@dataclass
class Loaded:
    """A benchmark's rows, the records set aside by reason, and the file they came from."""

    benchmark: Benchmark
    samples: list[Sample]
    path: Path
    set_aside: SetAside = field(default_factory=SetAside)

    @property
    def size_differs(self) -> str | None:
        """What to say if the rows are not as many as they should be."""
        size = self.benchmark.size
        if size is None or len(self.samples) == size:
            return None
        return f"{self.benchmark.name}: {len(self.samples):,} rows, the official set has {size:,}"


def load(benchmark: Benchmark, folder: Path, unpacked: Path) -> Loaded:
    """Read the first layout found in `folder` or in a folder inside it; pictures inside records go to `unpacked`.

    Raises `DataError` if there is none, or nothing usable in it.
    """
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for layout in benchmark.layouts:
        for place in (folder, *inside):
            if files := sorted(path for path in place.glob(layout.file) if path.is_file()):
                return _loaded(benchmark, layout, files, unpacked)
    wanted = " or ".join(layout.file for layout in benchmark.layouts)
    raise DataError(f"{folder}: no {wanted} for {benchmark.name}; get it from {benchmark.origin}")


def _loaded(benchmark: Benchmark, layout: Layout, files: Sequence[Path], unpacked: Path) -> Loaded:
    path = files[0]
    loaded = Loaded(benchmark, [], path)
    seen: set[str] = set()
    for number, record in enumerate(chain.from_iterable(map(read_records, files))):
        try:
            made = layout.to_sample(record, Place(benchmark.name, number, path.parent, unpacked))
            samples = [made] if isinstance(made, Sample) else made or []
            for sample in samples:
                sample.exchange()
        except GuardError as error:
            loaded.set_aside.add(str(error))
            continue
        for sample in samples:
            if sample.id in seen:
                loaded.set_aside.add("its id stands there already")
            elif sample.request_label is None and sample.response_label is None:
                loaded.set_aside.add("no label")
            else:
                seen.add(sample.id)
                loaded.samples.append(sample)
    if layout.pick:
        loaded.samples = list(layout.pick(loaded.samples))
    if not loaded.samples:
        raise DataError(
            f"{path}: no row of {benchmark.name} in it (set aside: {loaded.set_aside.reasons}); give the official file"
        )
    return loaded


def text_of(record: Record, name: str) -> str:
    """A field that must be a text with something in it."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise NotASampleError(f"no text in {name!r}")
    return value


def label_of(value: object, words: dict[object, GoldLabel]) -> GoldLabel:
    """The label that a published value means; an unknown word is never taken for unharmful."""
    label = words.get(value) if isinstance(value, (str, int, bool)) else None
    if label is None:
        raise NotASampleError(f"label {value!r:.30} is none of {', '.join(map(repr, words))}")
    return label


def picture_of(place: Place, *names: str) -> str:
    """The path of a picture that exists; names with other endings are tried too."""
    for name in names:
        path = place.folder / name
        for candidate in (path, *(path.with_suffix(ending) for ending in (".png", ".jpg", ".jpeg", ".webp"))):
            if candidate.is_file():
                return str(candidate)
    raise NotASampleError("its picture is missing")
