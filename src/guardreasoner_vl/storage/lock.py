"""Advisory locks on files and run folders, released when their process ends."""

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
"""Name of the lock file in a folder in use; it is removed when the lock is released."""

ANOTHER_OUT = "give another --out"
_LEFTOVER = re.compile(rf"\.(\d+)-[0-9a-f]{{8}}{re.escape(PARTIAL)}$")
_locked: ContextVar[frozenset[Path]] = ContextVar("locked_folders", default=frozenset())


def try_lock(file: int) -> bool:
    """Lock an open file for this process without waiting; returns False if another process has locked it."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def stands_at(path: Path, file: int) -> bool:
    """Whether `path` is still the open file, which has not been moved, removed or replaced."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def in_use(path: Path, command: str, alternative: str = ANOTHER_OUT) -> DataError:
    """The error to raise if another process, which runs `command`, has locked `path`."""
    return DataError(f"{path}: another {command} is writing it; wait for it or {alternative}")


@contextmanager
def locked_folder(folder: Path, command: str) -> Iterator[Path]:
    """Lock the folder, created if it is missing, for this process until the context ends.

    Code inside the context may lock it again. Raises `DataError`, which names the other command, if another process or
    thread has locked it. A folder that was created here and is still empty at the end is removed.
    """
    place = Path(os.path.realpath(folder))  # `Path.resolve` raises RuntimeError for circular links
    if place in _locked.get():
        yield folder
        return
    existed = folder.is_dir()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    file = _take_lock(folder, command)
    token = _locked.set(_locked.get() | {place})
    try:
        for used in (folder, *_inside(folder)):
            sweep(used)
        yield folder
    finally:
        _locked.reset(token)
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(file)
        if not existed:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _inside(folder: Path) -> list[Path]:
    """The subfolders that are not locked."""
    return [path for path in folder.iterdir() if path.is_dir() and not (path / LOCK).exists()]


def sweep(folder: Path, name: str = "*") -> None:
    """Remove partial files that killed processes left behind, for files whose names match the pattern `name`."""
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


def _take_lock(folder: Path, command: str) -> int:
    """Open and lock the folder's lock file; returns its descriptor."""
    path = folder / LOCK
    while True:
        with writing(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with writing(path):
                locked = try_lock(file)
            if not locked:
                raise in_use(folder, _holder(file))
            if stands_at(path, file):  # otherwise its last owner has removed it in the meantime
                with suppress(OSError):  # on a full disk the lock works without a name in it
                    os.ftruncate(file, 0)
                    os.pwrite(file, f"`{command}` (process {os.getpid()})".encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _holder(file: int) -> str:
    return os.pread(file, 200, 0).decode("utf-8", "replace").strip() or "command"
