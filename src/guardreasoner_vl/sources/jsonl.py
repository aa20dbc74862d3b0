"""A folder of labelled rows as JSON lines -> `Sample`s.

Layout: `train.jsonl[.gz]` and `validation.jsonl[.gz]`, pictures beside them. A row has the fields of
`Sample`; `images` are paths relative to the folder.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.types import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HELD_OUT_MODULUS = 20


@dataclass
class SetAside:
    """Rows that could not be used, counted by reason."""

    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    @property
    def total(self) -> int:
        return sum(self.reasons.values())


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
    """Stream the rows of one file. A broken row raises `DataError`, or is counted where `set_aside` is given."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _sample(json.loads(line), path.parent)
            except (ValueError, ValidationError) as error:
                if set_aside is None:
                    raise DataError(f"{path}, line {number}: not a sample; fix or remove it") from error
                set_aside.add("not a sample")


def _sample(row: dict[str, Any], folder: Path) -> Sample:
    images = [str(folder / name) for name in row.get("images") or ()]
    return Sample.model_validate({**row, "images": images, "prompt": row.get("prompt") or ""})
