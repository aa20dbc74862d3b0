"""Read `Sample`s from a folder of JSON lines.

Layout: `train.jsonl[.gz]` and `validation.jsonl[.gz]`, images beside them. A row has the fields of
`Sample`; `images` are paths relative to the folder.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.images.encoded import file_name_fault
from guardreasoner_vl.sources.checked import made_from, marks_fault
from guardreasoner_vl.sources.parquet import read_parquet
from guardreasoner_vl.sources.records import NotASampleError, read_with
from guardreasoner_vl.types.media import unread_medium

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.sources.skipped import SkippedRows
    from guardreasoner_vl.types import Sample

HELD_OUT_MODULUS = 20
_ENDINGS = (".json", ".json.gz", ".json.xz")


def is_held_out(sample_id: str) -> bool:
    """Whether a training row belongs to the fixed validation split: one in twenty, by its id's SHA-256."""
    return int(hashlib.sha256(sample_id.encode()).hexdigest(), 16) % HELD_OUT_MODULUS == 0


def never_held_out(sample_id: str) -> str:
    """The id with `+` appended until it is outside the validation split; for rows derived from training rows."""
    while is_held_out(sample_id):
        sample_id += "+"
    return sample_id


def find_split(folder: Path, split: str) -> Path:
    """The file of one split. Raises `DataError` if there is none."""
    for suffix in (".jsonl.gz", ".jsonl"):
        path = folder / f"{split}{suffix}"
        if path.is_file():
            return path
    raise DataError(f"{folder}: no {split}.jsonl or {split}.jsonl.gz; give a folder that holds one")


def read_samples(path: Path, skipped: SkippedRows | None = None) -> Iterator[Sample]:
    """Stream the rows of one file: Parquet or JSON by its name, else JSON lines.

    An invalid row raises `DataError`, or is added to `skipped` if that is given. A file that cannot be read to its
    end (a truncated download) raises `DataError` either way.
    """
    if path.suffix == ".parquet":
        yield from read_parquet(path, skipped)
        return
    yield from read_with(row_sample, path, ".json" if path.name.endswith(_ENDINGS) else ".jsonl", skipped)


def row_sample(record: Record, folder: Path) -> Sample:
    """The checked sample of one row; its images lie below `folder`. Raises `NotASampleError`."""
    names = record.get("images")
    names = [] if names is None else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise NotASampleError("images: not a list of paths")
    if medium := unread_medium(record, ("images",)):
        raise NotASampleError(f"{medium!a:.40}: not a field of a sample; use images, a list of paths")
    for name in names:
        if fault := file_name_fault(name):
            raise NotASampleError(f"images: {fault}")
    prompt = record.get("prompt")
    sample = made_from(
        {**record, "images": [str(folder / name) for name in names], "prompt": "" if prompt is None else prompt}
    )
    if fault := marks_fault(sample.prompt, len(names)):
        raise NotASampleError(f"prompt: {fault}")
    return sample
