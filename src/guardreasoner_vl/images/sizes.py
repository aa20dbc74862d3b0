"""Sizes of image files, decoded once and remembered in a file: a photograph takes a tenth of a second to decode.

Trainers count the tokens of every row before they begin, and again at every resume.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import decoded_images
from guardreasoner_vl.storage.jsonl_log import Format, JsonlLog, read_log_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from guardreasoner_vl.types import ImageSource

STORE = "image_sizes.jsonl"
_THREADS = 16
_SAVED = 256  # files measured between two writes


@dataclass(frozen=True)
class ImageSize:
    """Width and height of an image in pixels."""

    width: int
    height: int


Sizes: TypeAlias = tuple[ImageSize, ...]


@dataclass(frozen=True)
class _FileState:
    """A file's path, and its length in bytes and time of change in ns, which change if another image replaces it."""

    path: str
    length: int
    changed: int

    @classmethod
    def of(cls, path: str) -> _FileState:
        status = Path(path).stat()
        return cls(os.path.realpath(path), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class _Row:
    file: _FileState
    sizes: Sizes


def _parse(line: bytes) -> _Row:
    try:
        row = json.loads(line)
        sizes = tuple(ImageSize(int(width), int(height)) for width, height in row["sizes"])
        return _Row(_FileState(str(row["path"]), int(row["length"]), int(row["changed"])), sizes)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(str(error)) from error


_FORMAT = Format(_parse, "the sizes of an image file", "remove the file: sizes are measured again")


class ImageSizes:
    """The sizes of the images that a file gives (`images.decode.decoded_images`), in their order.

    `store` is a JSON lines file that is read first and extended by `measure`; without it nothing is remembered. Raises
    `DataError` if `store` is another file.
    """

    def __init__(self, store: Path | None = None) -> None:
        self._store = store
        rows = read_log_rows(store, _FORMAT, torn=True) if store and store.is_file() else ()
        self._known = {row.file: row.sizes for row in rows}

    def of(self, image: ImageSource) -> Sizes:
        """Sizes of one file's images, decoded if they are not known. Raises `ImageError`."""
        if isinstance(image, (str, os.PathLike)):
            try:
                known = self._known.get(_FileState.of(os.fspath(image)))
            except (OSError, ValueError):  # no such file, or no path at all
                known = None
            if known is not None:
                return known
        return tuple(ImageSize(decoded.width, decoded.height) for decoded in decoded_images(image))

    def measure(self, paths: Iterable[str]) -> None:
        """Decode the files whose sizes are not known, on several threads, and remember them.

        A file that cannot be read is left to `of`, which says why. Raises `DataError` if `store` cannot be written or
        another process writes it.
        """
        unknown = list(self._unknown(paths))
        if not unknown:
            return
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            for start in range(0, len(unknown), _SAVED):
                self._remember([row for row in pool.map(self._row, unknown[start : start + _SAVED]) if row])

    def _unknown(self, paths: Iterable[str]) -> Iterator[_FileState]:
        for path in dict.fromkeys(paths):
            try:
                file = _FileState.of(path)
            except (OSError, ValueError):
                continue
            if file not in self._known:
                yield file

    def _row(self, file: _FileState) -> _Row | None:
        try:
            return _Row(file, self.of(Path(file.path)))
        except ImageError:
            return None

    def _remember(self, rows: list[_Row]) -> None:
        self._known.update((row.file, row.sizes) for row in rows)
        if self._store and rows:
            with JsonlLog(self._store, _FORMAT, "a training stage") as log:
                log.mend()
                log.append(map(_size_line, rows))


def _size_line(row: _Row) -> bytes:
    sizes = [(size.width, size.height) for size in row.sizes]
    file = row.file
    return (
        json.dumps({"path": file.path, "length": file.length, "changed": file.changed, "sizes": sizes}).encode() + b"\n"
    )
