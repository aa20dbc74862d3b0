"""An append-only file of JSON lines: locked, repaired after a kill, and never rewritten in place.

Lines are on the disk when `append` returns. A kill leaves at most one torn line, at the end, which the next process
cuts off; a full disk leaves whole lines only.
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

Row = TypeVar("Row")
MAX_LINE = 1 << 28
"""Bytes of the longest line that is read."""

_BLOCK = 1 << 16


@dataclass(frozen=True)
class Format(Generic[Row]):
    """How a line is read: `parse` gives its row, or raises `ValueError`; `what` names a row in error messages, `remedy`
    says what to do with another line. No two rows may have the same `key`, if there is one.

    `torn` says whether an unterminated line that cannot be read is the beginning of a row and may be cut off.
    """

    parse: Callable[[bytes], Row]
    what: str
    remedy: str = "remove the line"
    key: Callable[[Row], object] | None = None
    torn: Callable[[bytes], bool] = lambda _: True


def lines_of(stream: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; of one above `MAX_LINE` bytes only so much that it is seen to be too long."""
    while line := stream.readline(MAX_LINE + 1):
        yield line
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE + 1)


def read_rows(path: Path, form: Format[Row], *, torn: bool = False) -> Iterator[Row]:
    """The rows of a file that another process may be writing; `torn` skips a last line that is not whole.

    Raises `DataError` if a line is not a row (it names the line) or repeats one, or if there is no file.
    """
    try:
        with path.open("rb") as stream:
            for _, row in _parsed(path, stream, form, torn):
                yield row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {form.remedy}") from error


def _parsed(path: Path, stream: BinaryIO, form: Format[Row], torn: bool) -> Iterator[tuple[int, Row]]:
    """Rows with their lines' numbers."""
    seen: dict[object, int] = {}
    for number, line in enumerate(lines_of(stream), 1):
        try:
            row = form.parse(line)
        except ValueError as error:
            if torn and not line.endswith(b"\n") and form.torn(line):
                return
            raise DataError(f"{path}, line {number}: not {form.what}; {form.remedy}") from error
        if form.key is not None and (first := seen.setdefault(form.key(row), number)) != number:
            raise DataError(f"{path}, line {number}: the row of line {first} again; remove one of the two lines")
        yield number, row


def is_torn(file: int) -> bool:
    """Whether an open file has bytes after its last newline."""
    if not os.fstat(file).st_size:
        return False
    os.lseek(file, -1, os.SEEK_END)
    return os.read(file, 1) != b"\n"


class JsonlLog(Generic[Row]):
    """The file at `path`, for one process at a time; use it as a context manager.

    `who` names the command that uses the file, `otherwise` what a second process can do instead of waiting. Raises
    `DataError` if another process has the file. The file stays as it is until `rows` has been read to its end without a
    fault, or `mend` is called.
    """

    def __init__(self, path: Path, form: Format[Row], who: str, otherwise: str = ANOTHER_OUT) -> None:
        self.path, self._form, self._who, self._otherwise = path, form, who, otherwise
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
        """Bytes of the file."""
        return os.fstat(self._stream.fileno()).st_size

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Every row with its line's number, from 1; then cut off a torn last line.

        Raises `DataError` with the line that is not a row or repeats one.
        """
        with self._reader() as stream:
            yield from _parsed(self.path, stream, self._form, torn=True)
        self.mend()

    def mend(self) -> None:
        """Terminate the last line if it is a row, cut it off if it is torn. Raises `DataError` if it is neither."""
        last = self._last()
        if not last:
            return
        try:
            self._form.parse(last)
        except ValueError as error:
            if not self._form.torn(last):
                raise DataError(f"{self.path}, the last line: not {self._form.what}; {self._form.remedy}") from error
            with writing(self.path):
                os.ftruncate(self._stream.fileno(), self.size - len(last))
        else:
            self.append([b"\n"])

    def append(self, lines: Iterable[bytes], *, sync: bool = True) -> None:
        """Add whole lines; with `sync` they are on the disk when this returns.

        If the disk does not take them all, none stays, and `DataError` is raised.
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
        """Put on the disk what `append` did not. After a fault nothing is appended any more. Raises `DataError`."""
        self._check()
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            self._fault = error
            raise unwritable(self.path, error) from error

    def cut(self, line: int) -> None:
        """Keep the first `line` lines and cut off the rest."""
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
        """Write other lines to a new file, locked from the start, that replaces the old one whole."""
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
        rest = memoryview(content)
        while rest:  # a disk that is nearly full takes a part
            rest = rest[self._stream.write(rest) :]

    def _check(self) -> None:
        if self._fault is not None:
            raise unwritable(self.path, self._fault)

    def _lock(self, stream: BinaryIO, path: Path) -> None:
        with writing(self.path):
            locked = try_lock(stream.fileno())
        if not locked or not stands_at(path, stream.fileno()):
            raise in_use(self.path, self._who, self._otherwise)

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
