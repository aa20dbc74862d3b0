"""Moderates a JSONL file: one verdict for each row, saved continuously; an interrupted run can be resumed.

A row is `{id, prompt?, images?, response?}` or `{id, messages}`; image paths are relative to the file. Each line of IN
gets one of three results:

- judged: a line `{"id": ..., "input": DIGEST, **verdict}` in OUT;
- error: such a line whose verdict is an error; the next run removes it and judges the row again, as it does where the
  row's content has another digest than OUT names;
- rejected: malformed, without an id, or with an id seen before; OUT's `.rejected.jsonl` lists line number and reason.

OUT's `.settings.json` holds the settings that decide its verdicts.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.batch.output import open_output, saved_line
from guardreasoner_vl.batch.rows import BatchRow, RejectedLine, read_batch_rows
from guardreasoner_vl.choices import CHUNK
from guardreasoner_vl.engines.faults import FaultStreak
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.storage.atomic import write_whole
from guardreasoner_vl.storage.jsonl_log import MAX_LINE, lines_of
from guardreasoner_vl.storage.lock import sweep
from guardreasoner_vl.storage.resume import check_inputs
from guardreasoner_vl.types import ModelInfo, Usage, Verdict, same_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Set

    from guardreasoner_vl.batch.output import RowId, SavedRow
    from guardreasoner_vl.guard import Item, Moderator


@dataclass
class Tally:
    """Counts of verdicts: by action, by label of the request and of the response, errors by code."""

    actions: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    responses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, verdict: Verdict) -> None:
        """Count one verdict."""
        self.actions[verdict.action] += 1
        self.requests[verdict.request.label] += 1
        self.responses[verdict.response.label] += 1
        if verdict.error:
            self.errors[verdict.error.code] += 1


@dataclass(frozen=True)
class BatchSummary:
    """The result of a run: `judged` counts rows of this run, `resumed` those of earlier runs.

    `tally` counts all of them; `usage` and `seconds` (wall clock) are of this run only. `ignored` names the fields that
    were not judged.
    """

    judged: int
    resumed: int
    rejected: tuple[RejectedLine, ...]
    ignored: tuple[str, ...]
    tally: Tally
    usage: Usage
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every line has a verdict that is not an error."""
        return not (self.rejected or self.tally.errors)

    @property
    def per_second(self) -> float:
        """Moderations per second in this run."""
        return self.judged / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class _InputScan:
    """The content of IN, read once before judging starts."""

    digests: dict[RowId, str]
    rejected: list[RejectedLine]
    ignored: tuple[str, ...]


def run_batch(
    guard: Moderator[Item],
    source: Path,
    target: Path,
    *,
    chunk: int = CHUNK,
    show_reasoning: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> BatchSummary:
    """Judge the rows of `source` that have no verdict in `target`, `chunk` at a time, and append their verdicts.

    `progress(done, total)` is called with numbers of rows. Raises `DataError`, before `target` changes, if `source`
    cannot be read, or if `target` is in use or is not a batch output of the same model, mode and settings, and
    `EngineError` if the engine stops answering.
    """
    started = time.perf_counter()
    source, target = check_paths(source, target)
    scan = _scan(source)
    tally, usage, judged = Tally(), Usage(), 0
    streak = FaultStreak("mend the engine; the same command resumes")

    def keep(saved: SavedRow) -> None:
        _check_same_guard(target, saved, guard)
        tally.add(saved)

    with open_output(target, scan.digests, keep) as (log, earlier):
        if not log.size:
            settings_path(target).unlink(missing_ok=True)
        if guard.settings:
            check_inputs(settings_path(target), "verdicts", guard.settings, out=target)
        remaining = scan.digests.keys() - earlier
        rows, ahead = tee(row for row in _rows_of_file(source) if isinstance(row, BatchRow) and row.id in remaining)
        verdicts = guard.moderate_batch((row.item for row in ahead), chunk=chunk)
        judged_rows = zip(rows, verdicts, strict=True)
        while batch := list(islice(judged_rows, chunk)):
            log.append(saved_line(row.id, row.digest, verdict, show_reasoning) for row, verdict in batch)
            for _, verdict in batch:
                tally.add(verdict)
                usage += verdict.usage
                streak.add(verdict.error)
            streak.check()
            judged += len(batch)
            if progress:
                progress(len(earlier) + judged, len(scan.digests))
        _write_rejected(rejected_path(target), scan.rejected)
    seconds = time.perf_counter() - started
    return BatchSummary(judged, len(earlier), tuple(scan.rejected), scan.ignored, tally, usage, seconds)


def check_paths(source: Path, target: Path) -> tuple[Path, Path]:
    """Resolve both paths without reading rows. Raises `DataError` if they cannot be IN and OUT of one run."""
    with _source_errors(source):
        if not source.is_file():
            raise DataError(f"{source}: {'not a regular' if source.exists() else 'no such'} file; give a JSONL file")
        source.open("rb").close()
    # `Path.resolve` raises RuntimeError for circular links.
    resolved = Path(os.path.realpath(target))
    if Path(os.path.realpath(source)) in (resolved, rejected_path(resolved), settings_path(resolved)):
        raise DataError(f"{target}: IN and OUT must be different files; name another OUT")
    if not resolved.parent.is_dir():
        raise DataError(f"{target}: its folder does not exist; create it first")
    if resolved.exists() and not resolved.is_file():
        raise DataError(f"{target}: not a regular file; name a file that can be appended to")
    for beside, keys in ((rejected_path, {"line", "reason"}), (settings_path, {"thresholds", "on_error"})):
        if not _is_written_by_batch(beside(resolved), keys):
            raise DataError(f"{beside(target)} exists and was not written by a batch; move it or name another OUT")
    return Path(os.path.realpath(source)), resolved


def rejected_path(target: Path) -> Path:
    """The path of the list of rejected lines: `OUT.rejected.jsonl`, also for an `OUT.jsonl`."""
    return target.with_name(f"{target.name.removesuffix('.jsonl')}.rejected.jsonl")


def settings_path(target: Path) -> Path:
    """The path of the settings that decided the verdicts: `OUT.settings.json`, also for an `OUT.jsonl`."""
    return target.with_name(f"{target.name.removesuffix('.jsonl')}.settings.json")


def _rows_of_file(source: Path) -> Iterator[BatchRow | RejectedLine]:
    with _source_errors(source), source.open("rb") as stream:
        yield from read_batch_rows(lines_of(stream), source.parent)


@contextmanager
def _source_errors(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _scan(source: Path) -> _InputScan:
    digests: dict[RowId, str] = {}
    rejected: list[RejectedLine] = []
    ignored: dict[str, None] = {}
    for row in _rows_of_file(source):
        if isinstance(row, RejectedLine):
            rejected.append(row)
        else:
            digests[row.id] = row.digest
            ignored.update(dict.fromkeys(row.ignored))
    return _InputScan(digests, rejected, tuple(ignored))


def _check_same_guard(target: Path, row: SavedRow, guard: Moderator[Item]) -> None:
    """Raise `DataError` if the row is another guard's: a reader would take all verdicts of a file for one guard's."""
    mode = guard.mode
    if row.mode != mode or not same_model(row.model, guard.model):
        raise DataError(
            f"{target} holds verdicts of {_model_text(row.model)} in mode {row.mode}, this run is "
            f"{_model_text(guard.model)} in mode {mode}; name another OUT or use the same settings"
        )


def _model_text(model: ModelInfo) -> str:
    return f"{model.name} ({model.revision})" if model.revision else model.name


def _is_written_by_batch(path: Path, keys: Set[str]) -> bool:
    """Whether the path is free or begins with a JSON object that has these keys, so that it may be overwritten."""
    if not path.exists():
        return True
    try:
        with path.open("rb") as stream:
            first, _ = json.JSONDecoder().raw_decode(stream.read(MAX_LINE).decode())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and first.keys() >= keys


def _write_rejected(path: Path, rejected: list[RejectedLine]) -> None:
    sweep(path.parent, f"{path.name}.*")
    if rejected:
        write_whole(
            path, [json.dumps({"line": line.line, "reason": line.reason}).encode() + b"\n" for line in rejected]
        )
    else:
        path.unlink(missing_ok=True)
