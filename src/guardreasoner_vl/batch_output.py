"""The file that a batch appends to: one line `{"id": ..., **verdict}` for each row.

A line is on disk (fsync) before the next chunk is read. A kill leaves at most one torn line, at the end; the
next run cuts it off. One run at a time has the file, by a lock that ends with its process.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from pydantic import StrictInt, StrictStr, ValidationError

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.types import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

RowId: TypeAlias = str | int
MAX_LINE = 1 << 28
"""Bytes of the longest line that is read."""
_OUR_START = b'{"id": '


class SavedRow(Verdict):
    """One line of the output."""

    id: StrictInt | StrictStr


@dataclass
class Earlier:
    """The rows that have a verdict to stay, and the lines that go."""

    done: set[RowId] = field(default_factory=set)
    drop: set[int] = field(default_factory=set)
    unterminated: bool = False


def saved_line(row_id: RowId, verdict: Verdict, show_reasoning: bool = False) -> bytes:
    """One line of the output."""
    return f'{{"id": {json.dumps(row_id)}, {verdict_json(verdict, show_reasoning)[1:]}\n'.encode("ascii")


def verdict_json(verdict: Verdict, show_reasoning: bool = False) -> str:
    """A verdict as one line of ASCII JSON, so that nothing in it ends a line or steers a terminal.

    Reasoning may restate what was judged, so it has to be asked for.
    """
    content = verdict.model_dump()
    if not show_reasoning:
        content["reasoning"] = None
    encodable = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
    return json.dumps(json.loads(encodable))


def lines_of(stream: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; of one above `MAX_LINE` bytes only so much that it is seen to be too long."""
    while line := stream.readline(MAX_LINE + 1):
        yield line
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE + 1)


@contextmanager
def opened(target: Path, ids: set[RowId], keep: Callable[[SavedRow], None]) -> Iterator[tuple[BinaryIO, set[RowId]]]:
    """The output, open for appending, and those of `ids` that it holds a verdict of.

    Torn lines and the error rows of `ids` are taken out first. `keep` sees each verdict of `ids` that stays
    and may raise. Raises `DataError`, and leaves the file as it is, if it is in use or holds anything else.
    """
    existed = target.exists()
    with ExitStack() as stack:
        out = stack.enter_context(_locked(target))
        try:
            earlier = _read(target, out, ids, keep)
            if earlier.drop or earlier.unterminated:
                out = stack.enter_context(_rewritten(target, out, earlier.drop))
            yield out, earlier.done
        finally:
            if not existed and not os.fstat(out.fileno()).st_size:
                target.unlink(missing_ok=True)


def append(out: BinaryIO, lines: Sequence[bytes]) -> None:
    """Add lines; they are on disk when this returns."""
    out.seek(0, os.SEEK_END)
    out.write(b"".join(lines))
    sync(out)


def write_whole(path: Path, lines: Iterable[bytes]) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as stream:
        stream.writelines(lines)
        sync(stream)
    partial.replace(path)


def sync(stream: Any) -> None:
    """Flush a file to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def _locked(path: Path, new: bool = False) -> Iterator[BinaryIO]:
    with path.open("x+b" if new else "a+b") as stream:
        if not _lock(stream) or not _stands_at(path, stream):
            raise DataError(f"{path}: another batch is writing it; wait for that one or name another OUT")
        yield stream


def _lock(stream: BinaryIO) -> bool:
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _stands_at(path: Path, stream: BinaryIO) -> bool:
    """False if the file was replaced between opening and locking it."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read(target: Path, out: BinaryIO, ids: set[RowId], keep: Callable[[SavedRow], None]) -> Earlier:
    earlier = Earlier()
    out.seek(0)
    for number, line in enumerate(lines_of(out), 1):
        row = _parsed(line)
        whole = line.endswith(b"\n")
        if row is None:
            if whole or not _torn(line):
                raise DataError(f"{target}, line {number}: not a batch's verdict; left as it is, name another OUT")
            earlier.drop.add(number)
            continue
        earlier.unterminated = not whole
        if row.id in ids and row.error:
            earlier.drop.add(number)
        elif row.id in ids and row.id not in earlier.done:
            keep(row)
            earlier.done.add(row.id)
    return earlier


def _parsed(line: bytes) -> SavedRow | None:
    try:
        return SavedRow.model_validate_json(line)
    except ValidationError:
        return None


def _torn(line: bytes) -> bool:
    """Whether an unterminated line is the beginning of one of ours; what is whole JSON is somebody else's."""
    if len(line) > MAX_LINE:
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith(_OUR_START[: len(line)])
    return False


@contextmanager
def _rewritten(target: Path, old: BinaryIO, drop: set[int]) -> Iterator[BinaryIO]:
    """The output without the lines `drop`; it takes the old one's place whole, and locked already."""
    partial = target.with_name(f"{target.name}.partial")
    partial.unlink(missing_ok=True)
    with _locked(partial, new=True) as new:
        old.seek(0)
        for number, line in enumerate(lines_of(old), 1):
            if number not in drop:
                new.write(line if line.endswith(b"\n") else line + b"\n")
        sync(new)
        partial.chmod(target.stat().st_mode & 0o777)
        partial.replace(target)
        sync_folder(target.parent)
        yield new


def sync_folder(folder: Path) -> None:
    """Have the disk know a folder's names, where the file system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot
        os.fsync(descriptor)
    os.close(descriptor)
