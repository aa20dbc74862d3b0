"""Files that are written whole or not at all, and the one line that says why a file could not be written."""

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
"""How the name of a file or folder ends that is not whole yet."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, whole or not at all. Raises `DataError` if the disk does not take it."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, whole or not at all. Raises `DataError` if the disk does not take it."""
    write_whole(path, (text.encode("utf-8"),))


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file whole or not at all; it is on the disk when this returns. Raises `DataError`."""
    with replacing(path) as partial, partial.open("wb") as stream:
        stream.writelines(parts)
        sync(stream)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new empty file to write in, which takes the place of `path` at the end; after an error it is removed.

    No two processes get the same one. Raises `DataError` for what the disk does not take.
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
    """Turn an `OSError` of a write into a `DataError` of one line that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DataError:
    """What to raise where `path` could not be written."""
    remedy = "make room" if error.errno in _FULL else "mend that"
    reason = error.strerror or type(error).__name__
    return DataError(f"{path} cannot be written ({reason}): {remedy}; the same command goes on")


def sync(stream: BinaryIO) -> None:
    """Flush a file to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Have the disk know a folder's names, where the file system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot
        os.fsync(descriptor)
    os.close(descriptor)
