"""An append-only file of JSON lines: locked, repaired after a kill, and never rewritten in place.

Lines are on the disk when `append` returns. A kill leaves at most one torn (incomplete) line, at the end of the file,
which the next process removes. If the disk is full, the file keeps only complete lines.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Generic, Self, TypeVar

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.storage.atomic import PARTIAL, sync_folder, unwritable, writing
from guardreasoner_vl.storage.lock import ANOTHER_OUT, in_use, stands_at, try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

RowT = TypeVar("RowT")
MAX_LINE = 1 << 28
"""Largest length of a line, in bytes."""

_BLOCK = 1 << 16


@dataclass(frozen=True)
class Format(Generic[RowT]):
    """How lines are read: `parse` returns a line's row or raises `ValueError`. In error messages, `noun` names a row,
    and `remedy` says what to do with an invalid line. If `key` is set, no two rows may have the same key.

    `torn` tells whether an unterminated invalid line is the beginning of a row and may be removed.
    """

    parse: Callable[[bytes], RowT]
    noun: str
    remedy: str = "remove the line"
    key: Callable[[RowT], object] | None = None
    torn: Callable[[bytes], bool] = lambda _: True


def lines_of(stream: BinaryIO) -> Iterator[bytes]:
    """Yield lines with their line ends. A line above `MAX_LINE` bytes is truncated, but stays recognisably too long."""
    while line := stream.readline(MAX_LINE + 1):
        yield line
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE + 1)


def read_log_rows(path: Path, form: Format[RowT], *, torn: bool = False) -> Iterator[RowT]:
    """Yield the rows of a file that another process may be writing; with `torn`, skip an incomplete last line.

    Raises `DataError`, which names the line, if a line is not a row or repeats one, or if the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            for _, row in _numbered_rows(path, stream, form, torn):
                yield row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {form.remedy}") from error


def _numbered_rows(path: Path, stream: BinaryIO, form: Format[RowT], torn: bool) -> Iterator[tuple[int, RowT]]:
    """Yield the rows with their line numbers."""
    line_of: dict[object, int] = {}
    for number, line in enumerate(lines_of(stream), 1):
        try:
            row = form.parse(line)
        except ValueError as error:
            if torn and not line.endswith(b"\n") and form.torn(line):
                return
            raise DataError(f"{path}, line {number}: not {form.noun}; {form.remedy}") from error
        if form.key is not None and (first := line_of.setdefault(form.key(row), number)) != number:
            raise DataError(f"{path}, line {number}: repeats the row of line {first}; remove one of the two lines")
        yield number, row


def is_torn(file: int) -> bool:
    """Whether an open file has bytes after its last newline."""
    if not os.fstat(file).st_size:
        return False
    os.lseek(file, -1, os.SEEK_END)
    return os.read(file, 1) != b"\n"


class JsonlLog(Generic[RowT]):
    """The file at `path`, opened by one process at a time; use it as a context manager.

    `command` uses the file; `alternative` is what a second process can do instead of waiting. Both are for messages.
    Raises `DataError` if another process has the file open. Opening does not change the file: it is repaired once
    `rows` has been read to the end without an error, or by `mend`.
    """

    def __init__(self, path: Path, form: Format[RowT], command: str, alternative: str = ANOTHER_OUT) -> None:
        self.path, self._form = path, form
        self._command, self._alternative = command, alternative
        self._fault: OSError | None = None

    def __enter__(self) -> Self:
        with writing(self.path):
            self._stream = self.path.open("a+b", buffering=0)
        try:
            self._lock(self._stream, self.path)
        except BaseException:
            self._stream.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return os.fstat(self._stream.fileno()).st_size

    def rows(self) -> Iterator[tuple[int, RowT]]:
        """Yield every row with its line number, from 1; then remove a torn last line.

        Raises `DataError`, which names the line, if a line is not a row or repeats one.
        """
        with self._reader() as stream:
            yield from _numbered_rows(self.path, stream, self._form, torn=True)
        self.mend()

    def mend(self) -> None:
        """Terminate the last line if it is a row, remove it if it is torn. Raises `DataError` if it is neither."""
        last = self._last()
        if not last:
            return
        try:
            self._form.parse(last)
        except ValueError as error:
            if not self._form.torn(last):
                raise DataError(f"{self.path}, the last line: not {self._form.noun}; {self._form.remedy}") from error
            with writing(self.path):
                os.ftruncate(self._stream.fileno(), self.size - len(last))
        else:
            self.append([b"\n"])

    def append(self, lines: Iterable[bytes], *, sync: bool = True) -> None:
        """Append complete lines; with `sync` they are on the disk when this returns.

        Raises `DataError` if they cannot all be written; then none of them is kept.
        """
        self._check()
        end = self.size
        try:
            self._put(b"".join(lines))
            if sync:
                os.fsync(self._stream.fileno())
        except BaseException as error:
            with suppress(OSError):
                os.ftruncate(self._stream.fileno(), end)
            if isinstance(error, OSError):
                raise unwritable(self.path, error) from error
            raise

    def sync(self) -> None:
        """Flush lines appended without `sync`. After an error, nothing more is appended. Raises `DataError`."""
        self._check()
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            self._fault = error
            raise unwritable(self.path, error) from error

    def cut(self, line: int) -> None:
        """Keep the first `line` lines and remove the rest."""
        with self._reader() as stream:
            size = sum(len(content) for number, content in enumerate(stream, 1) if number <= line)
        if size < self.size:
            with writing(self.path):
                os.ftruncate(self._stream.fileno(), size)
                os.fsync(self._stream.fileno())

    def without(self, lines: set[int]) -> None:
        """Remove the lines with these numbers, as `replace` does."""
        with self._reader() as stream:
            self.replace(line for number, line in enumerate(lines_of(stream), 1) if number not in lines)

    def replace(self, lines: Iterable[bytes]) -> None:
        """Write `lines` to a new file, locked from the start, and replace the old file with it."""
        old, partial = self._stream, self.path.with_name(f"{self.path.name}{PARTIAL}")
        with writing(self.path):
            partial.unlink(missing_ok=True)
            partial.open("xb").close()
            self._stream = partial.open("a+b", buffering=0)
            try:
                self._lock(self._stream, partial)
                partial.chmod(self.path.stat().st_mode & 0o777)
                for line in lines:
                    self._put(line if line.endswith(b"\n") else line + b"\n")
                os.fsync(self._stream.fileno())
                partial.replace(self.path)
            except BaseException:
                self._stream.close()
                self._stream = old
                partial.unlink(missing_ok=True)
                raise
            old.close()
            sync_folder(self.path.parent)

    def _put(self, content: bytes) -> None:
        unwritten = memoryview(content)
        while unwritten:  # a disk that is nearly full writes only a part
            unwritten = unwritten[self._stream.write(unwritten) :]

    def _check(self) -> None:
        if self._fault is not None:
            raise unwritable(self.path, self._fault)

    def _lock(self, stream: BinaryIO, path: Path) -> None:
        with writing(self.path):
            locked = try_lock(stream.fileno())
        if not locked or not stands_at(path, stream.fileno()):
            raise in_use(self.path, self._command, self._alternative)

    def _reader(self) -> BinaryIO:
        """The same open file, read from its start through a buffer."""
        stream = open(self._stream.fileno(), "rb", closefd=False)  # noqa: SIM115 - the caller closes it
        stream.seek(0)
        return stream

    def _last(self) -> bytes:
        """The bytes after the last newline."""
        if not is_torn(self._stream.fileno()):
            return b""
        tail, end = b"", self.size
        with self._reader() as stream:
            while end and b"\n" not in tail:
                start = max(0, end - _BLOCK)
                stream.seek(start)
                tail = stream.read(end - start) + tail
                end = start
        return tail.rpartition(b"\n")[2]
