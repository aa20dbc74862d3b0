"""Rows of the file formats that data sets are published in: JSON, JSON lines, CSV and Parquet, packed or not."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import lzma
import sys
import zlib
from typing import IO, TYPE_CHECKING, Any

from guardreasoner_vl.errors import DataError, MissingExtraError
from guardreasoner_vl.images import file_ending

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Record = dict[str, Any]
_OPEN = {".gz": gzip.open, ".xz": lzma.open}
_BROKEN = (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError, csv.Error)


def read_records(path: Path) -> Iterator[Record]:
    """The file's records; a JSON object of objects yields them with their key as `_key`. Raises `DataError`."""
    suffix = path.with_suffix("").suffix if path.suffix in _OPEN else path.suffix
    reader = _READERS.get(suffix)
    if reader is None:
        raise DataError(f"{path}: not a format that is read here; give {', '.join(_READERS)}, also with .gz or .xz")
    try:
        for number, record in enumerate(reader(path), 1):
            if not isinstance(record, dict):
                raise DataError(f"{path}: record {number} is no object; give the file as published")
            yield record
    except _BROKEN as error:
        raise DataError(f"{path}: cannot be read to its end ({type(error).__name__}); download it again") from error


def unpack_picture(value: object, folder: Path) -> str:
    """Write a picture that a record holds itself, as the hub's image columns do, and give its path.

    It is named after its bytes, so that it is written once. Raises `DataError` for anything else.
    """
    data = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(data, bytes) or not data:
        raise DataError("no picture in it")
    path = folder / f"{hashlib.sha256(data).hexdigest()[:24]}{file_ending(data)}"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(path)


def _text(path: Path) -> IO[str]:
    if path.suffix in _OPEN:
        return _OPEN[path.suffix](path, "rt", encoding="utf-8-sig", newline="")  # type: ignore[operator,no-any-return]
    return path.open(encoding="utf-8-sig", newline="")


def _json(path: Path) -> Iterator[Any]:
    with _text(path) as stream:
        content = json.load(stream)
    if isinstance(content, list):
        yield from content
        return
    if not isinstance(content, dict):
        raise ValueError("neither a list nor an object")
    for key, value in content.items():
        for record in value if isinstance(value, list) else [value]:
            yield {**record, "_key": key} if isinstance(record, dict) else record


def _json_lines(path: Path) -> Iterator[Any]:
    with _text(path) as stream:
        yield from (json.loads(line) for line in stream if line.strip())


def _csv(path: Path) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)
    with _text(path) as stream:
        yield from csv.DictReader(stream)


def _parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError("pyarrow", "eval") from error
    for batch in ParquetFile(path).iter_batches(batch_size=256):
        yield from batch.to_pylist()


_READERS = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
