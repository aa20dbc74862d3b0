"""A benchmark: what it is, where it comes from, and how its records become `Sample`s."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal

from guardreasoner_vl.errors import DataError, GuardError
from guardreasoner_vl.sources.adapters import Place, samples_of
from guardreasoner_vl.sources.records import read_records
from guardreasoner_vl.sources.skipped import SetAside

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guardreasoner_vl.sources.adapters import ToSample
    from guardreasoner_vl.types import Modality, Sample

Judged = Literal["prompt", "response", "both"]


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
    """Read the first layout found in `folder` or in a folder inside it; images inside records go to `unpacked`.

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
    for number, row in enumerate(chain.from_iterable(map(read_records, files))):
        try:
            samples = samples_of(row, Place(benchmark.name, number, path.parent, unpacked), layout.to_sample)
        except GuardError as error:
            loaded.set_aside.add(str(error), row.place)
            continue
        for sample in samples:
            if sample.id in seen:
                loaded.set_aside.add("its id stands there already", row.place)
            elif sample.request_label is None and sample.response_label is None:
                loaded.set_aside.add("no label", row.place)
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
