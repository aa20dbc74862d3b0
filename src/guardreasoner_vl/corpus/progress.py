"""The progress of a corpus's synthesis: rows with reasoning, skipped rows, and rows still to be asked about.

Only training rows count: validation and test rows need no reasoning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError, MissingExtraError
from guardreasoner_vl.sources.parquet import read_parquet
from guardreasoner_vl.sources.skipped import SkippedRows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guardreasoner_vl.corpus.attempts import AttemptIndex
    from guardreasoner_vl.types import Sample

TRAIN = "train"
REPEATED = "repeated id"


@dataclass
class SynthesisProgress:
    """Counts of training rows.

    `of_others` are the kept rows whose reasoning another teacher wrote, `faults` the remaining rows whose last attempt
    got no answer.
    """

    rows: int = 0
    kept: int = 0
    of_others: int = 0
    skipped: SkippedRows = field(default_factory=SkippedRows)
    faults: SkippedRows = field(default_factory=SkippedRows)

    @property
    def remaining(self) -> int:
        """Rows neither kept nor skipped."""
        return self.rows - self.kept - self.skipped.total


def count_progress(path: Path, index: AttemptIndex, teacher: str) -> SynthesisProgress:
    """Count the rows of a Parquet file for the teacher of this name, reading three columns. Raises `DataError`."""
    progress = SynthesisProgress()
    for row, has_reasoning in _ids(path):
        progress.rows += 1
        state = index.rows.get(row)
        if has_reasoning is None:
            progress.skipped.add(REPEATED, row)
        elif has_reasoning or (state and state.kept):
            progress.kept += 1
            progress.of_others += bool(not has_reasoning and state and state.teacher != teacher)
        elif state and state.skipped:
            progress.skipped.add(state.skipped, row)
        elif state and state.fault:
            progress.faults.add(state.fault, row)
    return progress


def pending(path: Path, index: AttemptIndex) -> Iterator[Sample]:
    """Stream the training rows that are neither kept nor skipped. Raises `DataError`."""
    ids: set[str] = set()
    for sample in read_parquet(path):
        state = index.rows.get(sample.id)
        wanted = sample.split == TRAIN and not _reasoned(sample.reasoning)
        if wanted and not (state and state.done) and sample.id not in ids:
            yield sample
        ids.add(sample.id)


def _ids(path: Path) -> Iterator[tuple[str, bool | None]]:
    """Each training row's id and whether the row itself has reasoning; None instead for a repeated id."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    ids: set[str] = set()
    try:
        for batch in ParquetFile(path).iter_batches(columns=["id", "split", "reasoning"]):
            for row in batch.to_pylist():
                if row["split"] != TRAIN:
                    continue
                yield row["id"], None if row["id"] in ids else _reasoned(row["reasoning"])
                ids.add(row["id"])
    except (OSError, pyarrow.ArrowException, ValueError, KeyError) as error:
        raise DataError(f"{path}: not rows of samples ({type(error).__name__}); write the file again") from error


def _reasoned(reasoning: str | None) -> bool:
    return bool(reasoning and reasoning.strip())
