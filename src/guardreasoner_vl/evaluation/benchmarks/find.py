"""Benchmarks by what a user names: a known one, or a file of labelled rows."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError, InputError
from guardreasoner_vl.evaluation.benchmarks.base import Benchmark, Loaded, load
from guardreasoner_vl.evaluation.benchmarks.catalogue import PAPER, named
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.sources.skipped import SetAside
from guardreasoner_vl.storage.hub import snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from guardreasoner_vl.types import Sample

HUB = "hub:"
_ENDINGS = (".json", ".parquet")
SPLITS = ("train", "validation", "test")
RELEASED = "yueliu1999/GuardReasoner-VLTest"


def find(names: Sequence[str], data: str | None, unpacked: Path) -> list[Loaded]:
    """The benchmarks named, or the paper's. A name is that of the catalogue, or a file of samples, also below `data`.

    `data` is the folder that holds the known ones, each as released or as published, or `hub:OWNER/NAME@REVISION`.
    Images that stand inside a set's records are written to `unpacked`. Raises `DataError`, `InputError`.
    """
    found: list[Loaded] = []
    folder: Path | None = None
    for name in names or PAPER:
        if (file := _file(name, data)) is not None:
            found.append(from_file(file))
            continue
        benchmark = named(name)
        folder = folder or _folder(data)
        own = folder / benchmark.name
        found.append(load(benchmark, own if own.is_dir() else folder, unpacked))
    twice = {
        one.benchmark.name for one in found if sum(one.benchmark.name == other.benchmark.name for other in found) > 1
    }
    if twice:
        raise InputError(f"{', '.join(sorted(twice))}: named twice; rename one file")
    return found


def _file(name: str, data: str | None) -> Path | None:
    places = [Path(name)] if data is None or data.startswith(HUB) else [Path(name), Path(data) / name]
    return next((path for path in places if path.is_file()), None)


def from_file(path: Path) -> Loaded:
    """A file of `Sample`s as one benchmark of its own, named after it, and a split's also after its folder."""
    set_aside = SetAside()
    name = path.name.removesuffix(".gz").removesuffix(path.suffix if path.suffix in _ENDINGS else ".jsonl")
    if name in SPLITS:
        name = f"{path.resolve().parent.name} {name}"
    return from_samples(name, read_samples(path, set_aside), path, set_aside)


def by_source(samples: Iterable[Sample], path: Path) -> Iterator[Loaded]:
    """Rows as one benchmark for each of their sources."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.source, []).append(sample)
    return (from_samples(name, rows, path, SetAside()) for name, rows in sorted(groups.items()))


def from_samples(name: str, samples: Iterable[Sample], path: Path, set_aside: SetAside) -> Loaded:
    """Rows without a label, without content, or whose id stands there already are set aside."""
    rows: dict[str, Sample] = {}
    for sample in samples:
        if sample.request_label is None and sample.response_label is None:
            set_aside.add("no label", sample.id)
        elif sample.id in rows:
            set_aside.add("its id stands there already", sample.id)
        elif not (sample.prompt.strip() or sample.images or (sample.response or "").strip()):
            set_aside.add("nothing to judge", sample.id)
        else:
            rows[sample.id] = sample
    if not rows:
        raise DataError(
            f"{path}: no labelled row in it (set aside: {set_aside.reasons}); give rows of the sample layout"
        )
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
    return Loaded(benchmark, kept, path, set_aside)


def drawn(loaded: Loaded, most: int | None) -> Loaded:
    """The same with at most so many rows, drawn by a digest of their ids and kept in their order."""
    if most is None or len(loaded.samples) <= most:
        return loaded
    digests = {sample.id: hashlib.sha256(sample.id.encode("utf-8", "replace")).digest() for sample in loaded.samples}
    kept = set(sorted(digests, key=digests.__getitem__)[:most])
    return replace(loaded, samples=[sample for sample in loaded.samples if sample.id in kept])


def _folder(data: str | None) -> Path:
    if data is None:
        raise InputError(f"give --data: the folder that holds the benchmarks, or {HUB}{RELEASED}@REVISION")
    if not data.startswith(HUB):
        folder = Path(data)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; give the one that holds the benchmarks")
        return folder
    name, _, revision = data.removeprefix(HUB).partition("@")
    return snapshot(name, revision or None, DataError, repo_type="dataset")
