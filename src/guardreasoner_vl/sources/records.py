"""Read rows of the formats that data sets are published in: JSON, JSON lines, CSV, Parquet; also with .gz or .xz.

An unreadable row becomes a `SourceRow` with a fault, and reading continues; a file that cannot be read to its end is an
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

    from guardreasoner_vl.sources.skipped import SkippedRows
    from guardreasoner_vl.types import Sample

Record = dict[str, Any]
NOT_JSON = "not JSON"
NOT_UTF8 = "not UTF-8"
NO_OBJECT = "not an object"
_OPEN = {".gz": gzip.open, ".xz": lzma.open}
_BROKEN = (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError, csv.Error)
_BOM = b"\xef\xbb\xbf"


class NotASampleError(DataError):
    """An unusable record; the message is the short reason under which it is counted."""


@dataclass(frozen=True)
class SourceRow:
    """One row of a file: its content, or the fault. `place` identifies it, for instance `train.jsonl, line 7`."""

    place: str
    content: Record = field(default_factory=dict)
    fault: str | None = None

    @property
    def record(self) -> Record:
        """The content. Raises `NotASampleError` if the row could not be read."""
        if self.fault is not None:
            raise NotASampleError(self.fault)
        return self.content


@dataclass(frozen=True)
class _Fault:
    """Why one row cannot be read."""

    reason: str


def read_with(
    make: Callable[[Record, Path], Sample], path: Path, ending: str, skipped: SkippedRows | None
) -> Iterator[Sample]:
    """Stream the samples that `make(record, folder)` builds from a file's records.

    An invalid row raises `DataError`, or is added to `skipped` if that is given.
    """
    for row in read_records(path, ending):
        try:
            yield make(row.record, path.parent)
        except NotASampleError as error:
            if skipped is None:
                raise DataError(f"{path.parent / row.place}: {error}; fix or remove it") from error
            skipped.add(str(error), row.place)


def read_records(path: Path, ending: str | None = None) -> Iterator[SourceRow]:
    """Stream a file's rows; `ending` overrides the format that its name says.

    Of a JSON object of objects, each object is a row with its key as `_key`. Raises `DataError` for a missing file, an
    unknown format, and a file that cannot be read to its end.
    """
    suffix = ending or (path.with_suffix("").suffix if path.suffix in _OPEN else path.suffix)
    reader = _READERS.get(suffix)
    if reader is None:
        raise DataError(f"{path}: unknown format; give {', '.join(_READERS)}, also with .gz or .xz")
    try:
        for place, content in reader(path):
            full_place = f"{path.name}, {place}"
            if isinstance(content, _Fault):
                yield SourceRow(full_place, fault=content.reason)
            elif isinstance(content, dict):
                yield SourceRow(full_place, content)
            else:
                yield SourceRow(full_place, fault=NO_OBJECT)
    except _BROKEN as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    """The error to raise for a file that cannot be opened or read to its end."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions")
    return DataError(f"{path}: cannot be read to its end ({type(error).__name__}); download it again")


def unpack_image(value: object, folder: Path) -> str:
    """Write an image embedded in a record, as in the hub's image columns, and return its path.

    The name is a hash of the bytes, so that each image is written once. Raises `NotASampleError` if there is none.
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
    """Stream the rows of a Parquet file; a row with an undecodable value is a fault that names the column."""
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
    except ValueError:  # one undecodable value fails the whole batch: convert its rows one by one
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


def _open_binary(path: Path) -> BinaryIO:
    if path.suffix in _OPEN:
        return _OPEN[path.suffix](path, "rb")  # type: ignore[operator,no-any-return]
    return path.open("rb")


def _open_text(path: Path) -> IO[str]:
    """The file as text; bytes that are not UTF-8 become lone surrogates, so that only their row is rejected."""
    if path.suffix in _OPEN:
        return _OPEN[path.suffix](  # type: ignore[operator,no-any-return]
            path, "rt", encoding="utf-8-sig", newline="", errors="surrogateescape"
        )
    return path.open(encoding="utf-8-sig", newline="", errors="surrogateescape")


def _read_json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Read one JSON document; if it does not parse, read it line by line, as JSON lines or as a list."""
    with _open_binary(path) as stream:
        data = stream.read().removeprefix(_BOM)
    try:
        content = json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        yield from _line_by_line(path, data, error)
        return
    if not isinstance(content, (list, dict)):
        raise DataError(f"{path}: neither a JSON list nor a JSON object; give the file as published")
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
    """Read one record a line. Raises `DataError` if no line is a record, or if a list is not closed (truncated)."""
    where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
    refused = DataError(f"{path}{where}: {NOT_JSON}; correct it there, or download the file again")
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
            rows.append((f"line {number}", _parse_line(text)))
    if not any(isinstance(record, dict) for _, record in rows):
        raise refused from error
    yield from rows


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open_binary(path) as stream:
        for number, line in enumerate(lines_of(stream), 1):
            text = line.removeprefix(_BOM) if number == 1 else line
            if len(text) > MAX_LINE:
                yield f"line {number}", _Fault(f"longer than {MAX_LINE:,} bytes")
            elif text.strip():
                yield f"line {number}", _parse_line(text)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _Fault(NOT_UTF8)
    except (ValueError, RecursionError):
        return _Fault(NOT_JSON)


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    with _open_text(path) as stream:
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
                record = (
                    dict(zip(columns, cells, strict=True))
                    if whole
                    else _Fault("number of cells differs from number of columns")
                )
                yield f"line {lines.line_num}", record


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(parquet_rows(path), 1):
        yield f"row {number}", record


_READERS = {".json": _read_json_records, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
