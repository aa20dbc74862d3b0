"""The output file of a batch: one line `{"id": ..., "input": DIGEST, **verdict}` for each row (`storage.jsonl_log`).

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
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

RowId: TypeAlias = str | int
_LINE_START = b'{"id": '


class SavedRow(Verdict):
    """A row's id, digest and verdict, as read from a line of the output; `input` is empty where none was written."""

    id: StrictInt | StrictStr
    input: StrictStr = ""


def saved_line(row_id: RowId, digest: str, verdict: Verdict, show_reasoning: bool = False) -> bytes:
    """Format a row's id, digest and verdict as a line of the output."""
    row = f'{{"id": {json.dumps(row_id)}, "input": "{digest}", {verdict_json(verdict, show_reasoning)[1:]}\n'
    return row.encode("ascii")


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
def open_output(
    target: Path, digests: Mapping[RowId, str], keep: Callable[[SavedRow], None]
) -> Iterator[tuple[JsonlLog[SavedRow], set[RowId]]]:
    """Open the output for appending; yields it with those ids of `digests` that already have a verdict.

    Torn lines, and the rows of these ids that are errors or have another digest, are removed first. `keep` is called
    with each remaining verdict of these ids and may raise. Raises `DataError`, without changing the file, if it is in
    use or contains other lines.
    """
    existed = target.exists()
    with JsonlLog(target, _FORMAT, "batch", "name another OUT") as log:
        try:
            done: set[RowId] = set()
            outdated: set[int] = set()
            for number, row in log.rows():
                if row.id not in digests:
                    continue
                if row.error or row.input not in ("", digests[row.id]):
                    outdated.add(number)
                elif row.id not in done:
                    keep(row)
                    done.add(row.id)
            if outdated:
                log.without(outdated)
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
