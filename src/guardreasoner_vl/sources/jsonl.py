"""A folder of labelled rows as JSON lines -> `Sample`s.

Layout: `train.jsonl[.gz]` and `validation.jsonl[.gz]`, pictures beside them. A row has the fields of
`Sample`; `images` are paths relative to the folder.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.types import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guardreasoner_vl.sources.set_aside import SetAside

HELD_OUT_MODULUS = 20


def is_held_out(sample_id: str) -> bool:
    """Whether a training row belongs to the fixed validation split (one row in twenty, by its id's SHA-256)."""
    return int(hashlib.sha256(sample_id.encode()).hexdigest(), 16) % HELD_OUT_MODULUS == 0


def find_split(folder: Path, split: str) -> Path:
    """The file of one split; raises `DataError` if there is none."""
    for suffix in (".jsonl.gz", ".jsonl"):
        path = folder / f"{split}{suffix}"
        if path.is_file():
            return path
    raise DataError(f"{folder}: no {split}.jsonl or {split}.jsonl.gz; give a folder that holds one")


def read_samples(path: Path, set_aside: SetAside | None = None) -> Iterator[Sample]:
    """Stream the rows of one file. A broken row raises `DataError`, or is counted where `set_aside` is given.

    A file that cannot be read to its end (a cut-off download) raises `DataError` either way.
    """
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            yield _sample(json.loads(line), path.parent)
        except (ValueError, RecursionError) as error:
            if set_aside is None:
                raise DataError(f"{path}, line {number}: not a sample; fix or remove it") from error
            set_aside.add("not a sample", f"{path.name}, line {number}")


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            yield from lines
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read to its end ({error}); download it again") from error


def _sample(row: Any, folder: Path) -> Sample:
    """Raises `ValueError` for anything but a sample."""
    images = row.get("images") or [] if isinstance(row, dict) else None
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise ValueError("a sample is a mapping, its images a list of paths")
    return Sample.model_validate(
        {**row, "images": [str(folder / name) for name in images], "prompt": row.get("prompt") or ""}
    )
