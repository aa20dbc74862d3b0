"""Moderates a JSONL file: one verdict for each row, saved continuously; an interrupted run can be resumed.

A row is `{id, prompt?, images?, response?}` or `{id, messages}`; image paths are relative to the file. Each line of IN
gets one of three results:

- judged: a line `{"id": ..., **verdict}` in OUT;
- error: such a line whose verdict is an error; the next run removes it and judges the row again;
- rejected: malformed, without an id, or with an id seen before; OUT's `.rejected.jsonl` lists line number and reason.
"""

from __future__ import annotations

import codecs
import difflib
import json
import os
import re
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.batch.output import opened, saved_line
from guardreasoner_vl.engines.faults import FaultStreak
from guardreasoner_vl.errors import DataError, InputError
from guardreasoner_vl.guard import CHUNK
from guardreasoner_vl.images.encoded import file_name_fault
from guardreasoner_vl.storage.atomic import write_whole
from guardreasoner_vl.storage.jsonl_log import MAX_LINE, lines_of
from guardreasoner_vl.storage.lock import sweep
from guardreasoner_vl.types import ModelInfo, Usage, Verdict, same_model
from guardreasoner_vl.types.media import unread_medium

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from guardreasoner_vl.batch.output import RowId, SavedRow
    from guardreasoner_vl.guard import Guard
    from guardreasoner_vl.remote.served import ServedGuard

_JUDGED = ("prompt", "images", "response", "messages")
_FIELDS = ("id", *_JUDGED)
_NOT_A_PATH = re.compile(r"data:|\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_MISSPELT = 0.85  # a similarity in [0, 1]: `image` and `images` are about as similar


@dataclass(frozen=True)
class BatchRow:
    """One valid line of IN; `item` is passed to the guard, `ignored` names the fields that are not judged."""

    line: int
    id: RowId
    item: dict[str, Any]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class RejectedLine:
    """An input line that was rejected: malformed, without an id, or with an id seen before."""

    line: int
    reason: str


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

    ids: set[RowId]
    rejected: list[RejectedLine]
    ignored: tuple[str, ...]


def run_batch(
    guard: Guard | ServedGuard,
    source: Path,
    target: Path,
    *,
    chunk: int = CHUNK,
    show_reasoning: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> BatchSummary:
    """Judge the rows of `source` that have no verdict in `target`, `chunk` at a time, and append their verdicts.

    `progress(done, total)` is called with numbers of rows. Raises `DataError`, before anything is written, if `source`
    cannot be read, or if `target` is in use or is not a batch output of the same model and mode, and `EngineError` if
    the engine stops answering.
    """
    started = time.perf_counter()
    source, target = check_paths(source, target)
    scan = _scan(source)
    tally, usage, judged = Tally(), Usage(), 0
    streak = FaultStreak("mend the engine; the same command resumes")

    def keep(saved: SavedRow) -> None:
        _check_same(target, saved, guard)
        tally.add(saved)

    with opened(target, scan.ids, keep) as (log, earlier):
        remaining = scan.ids - earlier
        rows = (row for row in _rows(source) if isinstance(row, BatchRow) and row.id in remaining)
        while batch := list(islice(rows, chunk)):
            verdicts = list(guard.moderate_batch([row.item for row in batch], chunk=chunk))
            log.append(saved_line(row.id, v, show_reasoning) for row, v in zip(batch, verdicts, strict=True))
            for verdict in verdicts:
                tally.add(verdict)
                usage += verdict.usage
                streak.add(verdict.error)
            streak.check()
            judged += len(batch)
            if progress:
                progress(len(earlier) + judged, len(scan.ids))
        _write_rejected(rejected_path(target), scan.rejected)
    seconds = time.perf_counter() - started
    return BatchSummary(judged, len(earlier), tuple(scan.rejected), scan.ignored, tally, usage, seconds)


def check_paths(source: Path, target: Path) -> tuple[Path, Path]:
    """Resolve both paths without reading rows. Raises `DataError` if they cannot be IN and OUT of one run."""
    with _reading(source):
        if not source.is_file():
            raise DataError(f"{source}: {'not a regular' if source.exists() else 'no such'} file; give a JSONL file")
        source.open("rb").close()
    # `Path.resolve` raises RuntimeError for circular links.
    resolved = Path(os.path.realpath(target))
    if Path(os.path.realpath(source)) in (resolved, rejected_path(resolved)):
        raise DataError(f"{target}: IN and OUT must be different files; name another OUT")
    if not resolved.parent.is_dir():
        raise DataError(f"{target}: its folder does not exist; create it first")
    if resolved.exists() and not resolved.is_file():
        raise DataError(f"{target}: not a regular file; name a file that can be appended to")
    if not _is_rejected_list(rejected_path(resolved)):
        raise DataError(f"{rejected_path(target)} exists and was not written by a batch; move it or name another OUT")
    return Path(os.path.realpath(source)), resolved


def rejected_path(target: Path) -> Path:
    """The path of the list of rejected lines: `OUT.rejected.jsonl`, also for an `OUT.jsonl`."""
    return target.with_name(f"{target.name.removesuffix('.jsonl')}.rejected.jsonl")


def read_rows(lines: Iterable[bytes], folder: Path) -> Iterator[BatchRow | RejectedLine]:
    """Yield the rows of a JSONL file and its rejected lines; image paths are relative to `folder`, blank lines skipped.

    Ambiguous lines are rejected.
    """
    seen: dict[RowId, int] = {}
    for number, line in enumerate(lines, 1):
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not content.strip():
            continue
        try:
            row = _row(number, content, folder)
            first = seen.setdefault(row.id, number)
            if first != number:
                raise InputError(f"line {first} has the same id: give each row its own id")
        except InputError as error:
            yield RejectedLine(number, str(error))
        else:
            yield row


def _row(number: int, line: bytes, folder: Path) -> BatchRow:
    content = _json_object(line)
    row_id = content.get("id")
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int)) or row_id == "":
        raise InputError("no id: give each row an id, a string or an integer")
    if isinstance(row_id, str) and not row_id.isascii() and row_id.encode("utf-8", "replace").decode() != row_id:
        raise InputError("the id is not valid Unicode: give another one")
    ignored = tuple(name for name in content if name not in _FIELDS)
    for name in ignored:
        similar = difflib.get_close_matches(name.lower(), _FIELDS, n=1, cutoff=_MISSPELT)
        if similar:
            raise InputError(f"field {name!a:.40}: did you mean {similar[0]!r}? Rename or remove it")
    if medium := unread_medium(content, _FIELDS):
        raise InputError(f"field {medium!a:.40}: this medium cannot be judged; give images in 'images', or remove it")
    item = {name: content[name] for name in _JUDGED if content.get(name) not in (None, "", [])}
    if isinstance(item.get("images"), list):
        item["images"] = [_located(image, folder) for image in item["images"]]
    return BatchRow(number, row_id, item, ignored)


def _json_object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise InputError(f"longer than {MAX_LINE:,} bytes: give images as paths")
    try:
        content = json.loads(line.decode("utf-8"), object_pairs_hook=_unambiguous)
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8: save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError("not JSON: write one JSON object on each line") from error
    if not isinstance(content, dict):
        raise InputError("not a JSON object: write {...} with an id")
    return content


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise InputError("an object has a key twice: JSON parsers differ on which one they use; remove one")
    return content


def _located(image: Any, folder: Path) -> Any:
    is_path = isinstance(image, str) and not _NOT_A_PATH.match(image) and file_name_fault(image) is None
    return folder / image if is_path else image


def _rows(source: Path) -> Iterator[BatchRow | RejectedLine]:
    with _reading(source), source.open("rb") as stream:
        yield from read_rows(lines_of(stream), source.parent)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _scan(source: Path) -> _InputScan:
    ids: set[RowId] = set()
    rejected: list[RejectedLine] = []
    ignored: dict[str, None] = {}
    for row in _rows(source):
        if isinstance(row, RejectedLine):
            rejected.append(row)
        else:
            ids.add(row.id)
            ignored.update(dict.fromkeys(row.ignored))
    return _InputScan(ids, rejected, tuple(ignored))


def _check_same(target: Path, row: SavedRow, guard: Guard | ServedGuard) -> None:
    """Raise `DataError` if the row is another guard's: a reader would take all verdicts of a file for one guard's."""
    mode = guard.mode
    if row.mode != mode or not same_model(row.model, guard.model):
        raise DataError(
            f"{target} holds verdicts of {_named(row.model)} in mode {row.mode}, this run is {_named(guard.model)} "
            f"in mode {mode}; name another OUT or use the same settings"
        )


def _named(model: ModelInfo) -> str:
    return f"{model.name} ({model.revision})" if model.revision else model.name


def _is_rejected_list(path: Path) -> bool:
    """Whether the path is free or holds a list of rejected lines, so that it may be overwritten."""
    if not path.exists():
        return True
    try:
        with path.open("rb") as stream:
            first = json.loads(stream.readline(MAX_LINE))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and first.keys() == {"line", "reason"}


def _write_rejected(path: Path, rejected: list[RejectedLine]) -> None:
    sweep(path.parent, f"{path.name}.*")
    if rejected:
        write_whole(
            path, [json.dumps({"line": line.line, "reason": line.reason}).encode() + b"\n" for line in rejected]
        )
    else:
        path.unlink(missing_ok=True)
