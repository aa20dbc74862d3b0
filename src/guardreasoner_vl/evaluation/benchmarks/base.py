"""Benchmarks: their description, their files, and loading them as `Sample`s."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal

from guardreasoner_vl.errors import DataError, GuardError
from guardreasoner_vl.sources.adapters import RecordContext, samples_of
from guardreasoner_vl.sources.records import read_records
from guardreasoner_vl.sources.skipped import SkippedRows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guardreasoner_vl.sources.adapters import ToSample
    from guardreasoner_vl.types import Modality, Sample

Judged = Literal["prompt", "response", "both"]


@dataclass(frozen=True)
class FileLayout:
    """One published layout: a file or glob pattern below the benchmark's folder, and the function that reads records.

    `pick` selects from all samples if the benchmark is a part of a larger file.
    """

    file: str
    to_sample: ToSample
    pick: Callable[[Sequence[Sample]], Sequence[Sample]] | None = None


@dataclass(frozen=True)
class Benchmark:
    """A labelled set. `size` is the official number of rows; `note` has remarks on its labels."""

    name: str
    judged: Judged
    modality: Modality
    size: int | None
    licence: str
    origin: str
    layouts: tuple[FileLayout, ...]
    note: str = ""


@dataclass
class LoadedBenchmark:
    """A benchmark's rows, the skipped records by reason, and the file they came from."""

    benchmark: Benchmark
    samples: list[Sample]
    path: Path
    skipped: SkippedRows = field(default_factory=SkippedRows)

    @property
    def size_differs(self) -> str | None:
        """A warning if the number of rows is not the official one; None otherwise."""
        size = self.benchmark.size
        if size is None or len(self.samples) == size:
            return None
        return f"{self.benchmark.name}: {len(self.samples):,} rows, but the official set has {size:,}"


def load(benchmark: Benchmark, folder: Path, unpacked: Path) -> LoadedBenchmark:
    """Read the first layout that matches in `folder` or in a subfolder; embedded images are written to `unpacked`.

    Raises `DataError` if no layout matches, or if no row is usable.
    """
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for layout in benchmark.layouts:
        for candidate in (folder, *subfolders):
            if files := sorted(path for path in candidate.glob(layout.file) if path.is_file()):
                return _loaded(benchmark, layout, files, unpacked)
    wanted = " or ".join(layout.file for layout in benchmark.layouts)
    raise DataError(f"{folder}: no {wanted} for {benchmark.name}; get it from {benchmark.origin}")


def _loaded(benchmark: Benchmark, layout: FileLayout, files: Sequence[Path], unpacked: Path) -> LoadedBenchmark:
    path = files[0]
    loaded = LoadedBenchmark(benchmark, [], path)
    ids: set[str] = set()
    for number, row in enumerate(chain.from_iterable(map(read_records, files))):
        try:
            samples = samples_of(row, RecordContext(benchmark.name, number, path.parent, unpacked), layout.to_sample)
        except GuardError as error:
            loaded.skipped.add(str(error), row.place)
            continue
        for sample in samples:
            if sample.id in ids:
                loaded.skipped.add("repeated id", row.place)
            elif sample.request_label is None and sample.response_label is None:
                loaded.skipped.add("no label", row.place)
            else:
                ids.add(sample.id)
                loaded.samples.append(sample)
    if layout.pick:
        loaded.samples = list(layout.pick(loaded.samples))
    if not loaded.samples:
        raise DataError(
            f"{path}: no row of {benchmark.name} in it (skipped: {loaded.skipped.reasons}); give the official file"
        )
    return loaded
