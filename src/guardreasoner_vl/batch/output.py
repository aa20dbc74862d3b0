"""The output file of a batch: one line `{"id": ..., **verdict}` for each row (`storage.jsonl_log`).

A line is on disk (fsync) before the next chunk is read. A kill leaves at most one torn line, at the end, which the next
run removes. A lock, released when its process ends, lets only one run at a time use the file.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from pydantic import StrictInt, StrictStr  # noqa: TC002 - pydantic reads the annotations

from guardreasoner_vl.storage.jsonl_log import MAX_LINE, Format, JsonlLog
from guardreasoner_vl.types import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RowId: TypeAlias = str | int
_LINE_START = b'{"id": '


class SavedRow(Verdict):
    """A row's id and verdict, as read from a line of the output."""

    id: StrictInt | StrictStr


def saved_line(row_id: RowId, verdict: Verdict, show_reasoning: bool = False) -> bytes:
    """Format a row's id and verdict as a line of the output."""
    return f'{{"id": {json.dumps(row_id)}, {verdict_json(verdict, show_reasoning)[1:]}\n'.encode("ascii")


def verdict_json(verdict: Verdict, show_reasoning: bool = False) -> str:
    """A verdict as one line of ASCII JSON, so that its text cannot end the line or control a terminal.

    Reasoning may repeat what was judged, so it is included only with `show_reasoning`.
    """
    content = verdict.model_dump()
    if not show_reasoning:
        content["reasoning"] = None
    encodable = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
    return json.dumps(json.loads(encodable))


@contextmanager
def opened(
    target: Path, ids: set[RowId], keep: Callable[[SavedRow], None]
) -> Iterator[tuple[JsonlLog[SavedRow], set[RowId]]]:
    """Open the output for appending; yields it with those of `ids` that already have a verdict.

    Torn lines and the error rows of `ids` are removed first. `keep` is called with each remaining verdict of `ids` and
    may raise. Raises `DataError`, without changing the file, if it is in use or contains other lines.
    """
    existed = target.exists()
    with JsonlLog(target, _FORMAT, "batch", "name another OUT") as log:
        try:
            done: set[RowId] = set()
            errors: set[int] = set()
            for number, row in log.rows():
                if row.id in ids and row.error:
                    errors.add(number)
                elif row.id in ids and row.id not in done:
                    keep(row)
                    done.add(row.id)
            if errors:
                log.without(errors)
            yield log, done
        finally:
            if not existed and not log.size:
                target.unlink(missing_ok=True)


def _torn(line: bytes) -> bool:
    """Whether an unterminated line is the beginning of a batch's line; complete JSON is not."""
    if len(line) > MAX_LINE:
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith(_LINE_START[: len(line)])
    return False


_FORMAT = Format(SavedRow.model_validate_json, "a batch's verdict", "left as it is, name another OUT", torn=_torn)
