"""Rows of the file formats that data sets are published in: JSON, JSON lines, CSV and Parquet, packed or not.

A row that cannot be read is a `Row` with a fault and costs no other row; a file that cannot be read to its end is an
error.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import lzma
import sys
import zlib
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from guardreasoner_vl.errors import DataError, MissingExtraError
from guardreasoner_vl.images.decode import file_ending
from guardreasoner_vl.storage.atomic import write_whole
from guardreasoner_vl.storage.jsonl_log import MAX_LINE, lines_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from guardreasoner_vl.sources.skipped import SetAside
    from guardreasoner_vl.types import Sample

Record = dict[str, Any]
NOT_JSON = "not JSON"
NOT_UTF8 = "not UTF-8"
NO_OBJECT = "not an object"
_OPEN = {".gz": gzip.open, ".xz": lzma.open}
_BROKEN = (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError, csv.Error)
_BOM = b"\xef\xbb\xbf"


class NotASampleError(DataError):
    """A record that cannot be used; its text is the short reason that is counted."""


@dataclass(frozen=True)
class Row:
    """One row of a file: its content, or why it has none. `place` names it, such as `train.jsonl, line 7`."""

    place: str
    content: Record = field(default_factory=dict)
    fault: str | None = None

    @property
    def record(self) -> Record:
        """Raises `NotASampleError` if the row cannot be read."""
        if self.fault is not None:
            raise NotASampleError(self.fault)
        return self.content


@dataclass(frozen=True)
class _Fault:
    """Why one row cannot be read."""

    reason: str


def read_with(
    make: Callable[[Record, Path], Sample], path: Path, ending: str, set_aside: SetAside | None
) -> Iterator[Sample]:
    """The samples that `make` reads from the records of a file and its folder.

    A row for which that fails raises `DataError`, or is named in `set_aside`, if it is given, with the reason.
    """
    for row in read_records(path, ending):
        try:
            yield make(row.record, path.parent)
        except NotASampleError as error:
            if set_aside is None:
                raise DataError(f"{path.parent / row.place}: {error}; fix or remove it") from error
            set_aside.add(str(error), row.place)


def read_records(path: Path, ending: str | None = None) -> Iterator[Row]:
    """The file's rows, by its `ending` or its name's; a JSON object of objects yields them with their key as `_key`.

    Raises `DataError` for a file that is not there, of another format, or that cannot be read to its end.
    """
    suffix = ending or (path.with_suffix("").suffix if path.suffix in _OPEN else path.suffix)
    reader = _READERS.get(suffix)
    if reader is None:
        raise DataError(f"{path}: not a format that is read here; give {', '.join(_READERS)}, also with .gz or .xz")
    try:
        for place, content in reader(path):
            named = f"{path.name}, {place}"
            if isinstance(content, _Fault):
                yield Row(named, fault=content.reason)
            elif isinstance(content, dict):
                yield Row(named, content)
            else:
                yield Row(named, fault=NO_OBJECT)
    except _BROKEN as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    """The error to raise if a file cannot be opened, or cannot be read to its end."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions")
    return DataError(f"{path}: cannot be read to its end ({type(error).__name__}); download it again")


def unpack_image(value: object, folder: Path) -> str:
    """Write an image that a record holds itself, as the hub's image columns do, and give its path.

    It is named after its bytes, so that it is written once. Raises `NotASampleError` for anything else.
    """
    data = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(data, bytes) or not data:
        raise NotASampleError("no image in it")
    path = folder / f"{hashlib.sha256(data).hexdigest()[:24]}{file_ending(data)}"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, (data,))
    return str(path)


def parquet_rows(path: Path) -> Iterator[Record | _Fault]:
    """The rows of a Parquet file. One whose value cannot be decoded is a fault that names the column."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError("pyarrow", "eval") from error
    try:
        with path.open("rb") as stream:
            for batch in ParquetFile(stream).iter_batches(batch_size=256):
                yield from _records(batch)
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from error


def _records(batch: Any) -> list[Record | _Fault]:
    try:
        whole: list[Record | _Fault] = batch.to_pylist()
    except ValueError:  # one bad value spoils the batch: take its rows one by one
        return [_decoded(batch, number) for number in range(batch.num_rows)]
    return whole


def _decoded(batch: Any, number: int) -> Record | _Fault:
    record: Record = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            record[name] = column[number].as_py()
        except UnicodeDecodeError:
            return _Fault(f"{name!a:.40}: {NOT_UTF8}")
        except ValueError:
            return _Fault(f"{name!a:.40}: a value out of range")
    return record


def _opened(path: Path) -> BinaryIO:
    if path.suffix in _OPEN:
        return _OPEN[path.suffix](path, "rb")  # type: ignore[operator,no-any-return]
    return path.open("rb")


def _text(path: Path) -> IO[str]:
    """The file as text; bytes that are not UTF-8 become lone surrogates, so that only their row is refused."""
    if path.suffix in _OPEN:
        return _OPEN[path.suffix](  # type: ignore[operator,no-any-return]
            path, "rt", encoding="utf-8-sig", newline="", errors="surrogateescape"
        )
    return path.open(encoding="utf-8-sig", newline="", errors="surrogateescape")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """One document, or, where that breaks, one record a line: JSON lines, or a list with its brackets and commas."""
    with _opened(path) as stream:
        data = stream.read().removeprefix(_BOM)
    try:
        content = json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        yield from _line_by_line(path, data, error)
        return
    if not isinstance(content, (list, dict)):
        raise DataError(f"{path}: neither a list nor an object; give the file as published")
    for number, record in enumerate(content if isinstance(content, list) else _keyed(content), 1):
        yield f"record {number}", record


def _keyed(content: Record) -> Iterator[Any]:
    groups = {key: value if isinstance(value, list) else [value] for key, value in content.items()}
    if not any(isinstance(record, dict) for group in groups.values() for record in group):
        yield content  # JSON lines with a single line
        return
    for key, group in groups.items():
        for record in group:
            yield {**record, "_key": key} if isinstance(record, dict) else record


def _line_by_line(path: Path, data: bytes, error: Exception) -> Iterator[tuple[str, Any]]:
    """One record a line. Raises `DataError` if no line is a record, or if a list has no end, so that rows are lost."""
    where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
    refused = DataError(f"{path}{where}: {NOT_JSON}; mend it there, or download the file again")
    stripped = data.strip()
    is_list = stripped.startswith(b"[")
    if is_list and not stripped.endswith(b"]"):
        raise refused
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        text = line.strip()
        if is_list:
            text = text.removeprefix(b"[").removesuffix(b"]").strip().removesuffix(b",").strip()
        if text:
            rows.append((f"line {number}", _parsed(text)))
    if not any(isinstance(record, dict) for _, record in rows):
        raise refused from error
    yield from rows


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as stream:
        for number, line in enumerate(lines_of(stream), 1):
            text = line.removeprefix(_BOM) if number == 1 else line
            if len(text) > MAX_LINE:
                yield f"line {number}", _Fault(f"longer than {MAX_LINE:,} bytes")
            elif text.strip():
                yield f"line {number}", _parsed(text)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _Fault(NOT_UTF8)
    except (ValueError, RecursionError):
        return _Fault(NOT_JSON)


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    with _text(path) as stream:
        lines = csv.reader(stream)
        columns = next(lines, [])
        while True:
            try:
                cells = next(lines)
            except StopIteration:
                return
            except csv.Error:
                yield f"line {lines.line_num}", _Fault("not CSV")
                continue
            if cells:
                whole = len(cells) == len(columns)
                record = dict(zip(columns, cells, strict=True)) if whole else _Fault("not as many cells as columns")
                yield f"line {lines.line_num}", record


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(parquet_rows(path), 1):
        yield f"row {number}", record


_READERS = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
