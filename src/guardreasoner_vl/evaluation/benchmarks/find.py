"""Find benchmarks by name: known ones, or files of labelled rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError, InputError
from guardreasoner_vl.evaluation.benchmarks.base import Benchmark, LoadedBenchmark, load
from guardreasoner_vl.evaluation.benchmarks.catalogue import PAPER, benchmark_named
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.storage.hub import snapshot

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from guardreasoner_vl.types import Sample

HUB = "hub:"
_ENDINGS = (".json", ".parquet")
SPLITS = ("train", "validation", "test")
RELEASED = "yueliu1999/GuardReasoner-VLTest"


def find(names: Sequence[str], data: str | None, unpacked: Path) -> list[LoadedBenchmark]:
    """Load the named benchmarks (default: the paper's). A name is a known one, or a file of samples, also below `data`.

    `data` is the folder with the known benchmarks, as released or as published, or `hub:OWNER/NAME@REVISION`. Embedded
    images are written to `unpacked`. Raises `DataError` for files that cannot be used, `InputError` for wrong names.
    """
    benchmarks: list[LoadedBenchmark] = []
    folder: Path | None = None
    for name in names or PAPER:
        if (file := _file(name, data)) is not None:
            benchmarks.append(from_file(file))
            continue
        benchmark = benchmark_named(name)
        folder = folder or _folder(data)
        subfolder = folder / benchmark.name
        benchmarks.append(load(benchmark, subfolder if subfolder.is_dir() else folder, unpacked))
    counts = Counter(loaded.benchmark.name for loaded in benchmarks)
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise InputError(f"{', '.join(repeated)}: named twice; name each once, or rename a file")
    return benchmarks


def _file(name: str, data: str | None) -> Path | None:
    places = [Path(name)] if data is None or data.startswith(HUB) else [Path(name), Path(data) / name]
    return next((path for path in places if path.is_file()), None)


def from_file(path: Path) -> LoadedBenchmark:
    """A file of `Sample`s as one benchmark, named after the file; a split, such as `test`, after its folder too."""
    skipped = SkippedRows()
    name = path.name.removesuffix(".gz").removesuffix(path.suffix if path.suffix in _ENDINGS else ".jsonl")
    if name in SPLITS:
        name = f"{path.resolve().parent.name} {name}"
    return from_samples(name, read_samples(path, skipped), path, skipped)


def by_source(samples: Iterable[Sample], path: Path) -> Iterator[LoadedBenchmark]:
    """Group rows into one benchmark per source."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.source, []).append(sample)
    return (from_samples(name, rows, path, SkippedRows()) for name, rows in sorted(groups.items()))


def from_samples(name: str, samples: Iterable[Sample], path: Path, skipped: SkippedRows) -> LoadedBenchmark:
    """Build a benchmark; rows without a label, without content or with a repeated id are added to `skipped`."""
    rows: dict[str, Sample] = {}
    for sample in samples:
        if sample.request_label is None and sample.response_label is None:
            skipped.add("no label", sample.id)
        elif sample.id in rows:
            skipped.add("repeated id", sample.id)
        elif not (sample.has_request or sample.has_response):
            skipped.add("nothing to judge", sample.id)
        else:
            rows[sample.id] = sample
    if not rows:
        raise DataError(f"{path}: no labelled row in it (skipped: {skipped.reasons}); give rows of the sample layout")
    kept = list(rows.values())
    modalities = {sample.modality for sample in kept}
    benchmark = Benchmark(
        name=name,
        judged="both",
        modality=modalities.pop() if len(modalities) == 1 else "text-image",
        size=None,
        licence="not recorded",
        origin=str(path),
        layouts=(),
    )
    return LoadedBenchmark(benchmark, kept, path, skipped)


def subsample(loaded: LoadedBenchmark, most: int | None) -> LoadedBenchmark:
    """At most `most` rows, chosen by a digest of their ids, in their order; all rows if it is None."""
    if most is None or len(loaded.samples) <= most:
        return loaded
    digests = {sample.id: hashlib.sha256(sample.id.encode("utf-8", "replace")).digest() for sample in loaded.samples}
    kept = set(sorted(digests, key=digests.__getitem__)[:most])
    return replace(loaded, samples=[sample for sample in loaded.samples if sample.id in kept])


def without_sources(loaded: LoadedBenchmark, sources: Collection[str]) -> LoadedBenchmark:
    """The rows of all other sources. Raises `InputError` for a source without a row."""
    if missing := sorted(set(sources) - {sample.source for sample in loaded.samples}):
        raise InputError(f"no row is of the source {', '.join(missing)}: leave it out, or check its name")
    return replace(loaded, samples=[sample for sample in loaded.samples if sample.source not in sources])


def _folder(data: str | None) -> Path:
    if data is None:
        raise InputError(f"no --data: give the folder that holds the benchmarks, or {HUB}{RELEASED}@REVISION")
    if not data.startswith(HUB):
        folder = Path(data)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; give the one that holds the benchmarks")
        return folder
    name, _, revision = data.removeprefix(HUB).partition("@")
    return snapshot(name, revision or None, DataError, repo_type="dataset")
