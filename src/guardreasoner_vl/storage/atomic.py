"""Writes files atomically: completely or not at all. Also defines the error for a file that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import secrets
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from guardreasoner_vl.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

PARTIAL = ".partial"
"""The suffix of a file's or folder's name while it is being written."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically. Raises `DataError` if the file cannot be written."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically. Raises `DataError` if the file cannot be written."""
    write_whole(path, (text.encode("utf-8"),))


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file atomically; it is on the disk when this returns. Raises `DataError`."""
    with replacing(path) as partial, partial.open("wb") as stream:
        stream.writelines(parts)
        sync(stream)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new empty file next to `path`. At the end it replaces `path`; after an error it is removed.

    No two processes get the same file. Raises `DataError` if it cannot be written.
    """
    with writing(path):
        partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
        partial.open("xb").close()
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` into a `DataError` that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DataError:
    """The error to raise if `path` cannot be written."""
    remedy = "make room" if error.errno in _FULL else "check the path and its permissions"
    reason = error.strerror or type(error).__name__
    return DataError(f"{path} cannot be written ({reason}): {remedy}; the same command resumes")


def sync(stream: BinaryIO) -> None:
    """Flush a file to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, if the file system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # not every file system supports it
        os.fsync(descriptor)
    os.close(descriptor)
