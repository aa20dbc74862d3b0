"""Where the reasoning of a corpus stands: how many rows have it, which are still asked about, which never will be.

Rows to train on alone: those held out for validation and test need no reasoning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError, MissingExtraError
from guardreasoner_vl.sources.parquet import read_rows
from guardreasoner_vl.sources.skipped import SetAside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guardreasoner_vl.corpus.attempts import Ledger
    from guardreasoner_vl.types import Sample

TRAIN = "train"
REPEATED = "its id stands on an earlier row"


@dataclass
class Standing:
    """Where a corpus stands. `faults` are the rows left whose teacher could not be reached when last asked."""

    rows: int = 0
    kept: int = 0
    set_aside: SetAside = field(default_factory=SetAside)
    faults: SetAside = field(default_factory=SetAside)

    @property
    def left(self) -> int:
        return self.rows - self.kept - self.set_aside.total


def standing(path: Path, ledger: Ledger) -> Standing:
    """Count the rows of a Parquet file; reads three of its columns. Raises `DataError`."""
    found = Standing()
    for row, own in _ids(path):
        found.rows += 1
        state = ledger.rows.get(row)
        if own is None:
            found.set_aside.add(REPEATED, row)
        elif own or (state and state.kept):
            found.kept += 1
        elif state and state.set_aside:
            found.set_aside.add(state.set_aside, row)
        elif state and state.fault:
            found.faults.add(state.fault, row)
    return found


def pending(path: Path, ledger: Ledger) -> Iterator[Sample]:
    """Stream the rows that have neither reasoning nor a last word. Raises `DataError`."""
    seen: set[str] = set()
    for sample in read_rows(path):
        state = ledger.rows.get(sample.id)
        wanted = sample.split == TRAIN and not _reasoned(sample.reasoning)
        if wanted and not (state and state.done) and sample.id not in seen:
            yield sample
        seen.add(sample.id)


def _ids(path: Path) -> Iterator[tuple[str, bool | None]]:
    """Each row's id and whether it came with reasoning; None for an id that stood before."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    seen: set[str] = set()
    try:
        for batch in ParquetFile(path).iter_batches(columns=["id", "split", "reasoning"]):
            for row in batch.to_pylist():
                if row["split"] != TRAIN:
                    continue
                yield row["id"], None if row["id"] in seen else _reasoned(row["reasoning"])
                seen.add(row["id"])
    except (OSError, pyarrow.ArrowException, ValueError, KeyError) as error:
        raise DataError(f"{path}: not rows of samples ({type(error).__name__}); write the file again") from error


def _reasoned(reasoning: str | None) -> bool:
    return bool(reasoning and reasoning.strip())
