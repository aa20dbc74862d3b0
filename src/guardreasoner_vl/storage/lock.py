"""Advisory locks that end with their process: of a file, and of a run's folder."""

from __future__ import annotations

import os
import re
import sys
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.storage.atomic import PARTIAL, writing

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK = ".lock"
"""The lock file of a folder in use; it is removed when the folder is released."""

ANOTHER_OUT = "give another --out"
_LEFTOVER = re.compile(rf"\.(\d+)-[0-9a-f]{{8}}{re.escape(PARTIAL)}$")
_held: ContextVar[frozenset[Path]] = ContextVar("held_folders", default=frozenset())


def try_lock(file: int) -> bool:
    """Lock an open file for this process, without waiting; False if another one has it."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def stands_at(path: Path, file: int) -> bool:
    """Whether the open file is still the one at `path`, not moved, removed or replaced."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def in_use(path: Path, who: str, otherwise: str = ANOTHER_OUT) -> DataError:
    """The error to raise if another process has `path`; `who` names its command."""
    return DataError(f"{path}: another {who} is writing it; wait for it or {otherwise}")


@contextmanager
def locked_folder(folder: Path, command: str) -> Iterator[Path]:
    """Lock the folder, created if it is missing, for this process until the end.

    Code inside may lock it again. Raises `DataError` that names the other command if another process, or another
    thread, has it. A folder that was created and stays empty is removed.
    """
    place = Path(os.path.realpath(folder))  # `Path.resolve` raises a RuntimeError for links that lead in a circle
    if place in _held.get():
        yield folder
        return
    existed = folder.is_dir()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    file = _taken(folder, command)
    held = _held.set(_held.get() | {place})
    try:
        for used in (folder, *_inside(folder)):
            sweep(used)
        yield folder
    finally:
        _held.reset(held)
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(file)
        if not existed:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _inside(folder: Path) -> list[Path]:
    """The folders inside that no other process has locked."""
    return [path for path in folder.iterdir() if path.is_dir() and not (path / LOCK).exists()]


def sweep(folder: Path, name: str = "*") -> None:
    """Remove the half-written files that killed processes left of the files of that name."""
    for path in folder.glob(f"{name}{PARTIAL}"):
        if (leftover := _LEFTOVER.search(path.name)) and not _runs(int(leftover[1])):
            with suppress(OSError):
                path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _taken(folder: Path, command: str) -> int:
    """The folder's lock file, open and locked."""
    path = folder / LOCK
    while True:
        with writing(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with writing(path):
                locked = try_lock(file)
            if not locked:
                raise in_use(folder, _holder(file))
            if stands_at(path, file):  # else the last process that had it has removed it in between
                with suppress(OSError):  # on a full disk the lock holds without a name in it
                    os.ftruncate(file, 0)
                    os.pwrite(file, f"`{command}` (process {os.getpid()})".encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _holder(file: int) -> str:
    return os.pread(file, 200, 0).decode("utf-8", "replace").strip() or "command"
