"""Write and read `Sample`s as rows of a Parquet file, with images embedded or referred to by path.

`datasets.load_dataset("parquet", data_files=FILE)` reads the file too and decodes the images.
"""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import DataError, MissingExtraError
from guardreasoner_vl.images.encoded import file_name_fault
from guardreasoner_vl.sources.checked import made_from
from guardreasoner_vl.sources.records import NotASampleError, read_with, unpack_image, unreadable
from guardreasoner_vl.storage.atomic import replacing
from guardreasoner_vl.types.media import unread_medium

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.sources.skipped import SkippedRows
    from guardreasoner_vl.types import Sample

SCHEMA = 1
"""Version of the columns."""

IMAGES = "images"
"""Subfolder beside a file: images that were embedded in its rows."""

_TEXTS = ("id", "source", "split", "modality", "prompt", "response", "request_label", "response_label", "reasoning")
_NEEDED = ("id", "source", "modality")
_BATCH = 256


def write_parquet(path: Path, samples: Iterable[Sample], *, embed: bool = False) -> int:
    """Write the rows atomically and return their number; `embed` stores the images' bytes in the file.

    Without `embed`, image paths are relative if the image lies below the file's folder, else absolute.
    Raises `DataError` for an image that cannot be read.
    """
    pyarrow, parquet = _arrow()
    path.parent.mkdir(parents=True, exist_ok=True)
    schema, stream, count = _arrow_schema(pyarrow), iter(samples), 0
    with replacing(path) as partial:
        with parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
            while batch := list(islice(stream, _BATCH)):
                rows = [_parquet_row(sample, path.parent, embed) for sample in batch]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                count += len(batch)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
    return count


def read_parquet(path: Path, skipped: SkippedRows | None = None) -> Iterator[Sample]:
    """Stream the samples of a Parquet file; embedded images are written to the folder `images` beside it.

    An invalid row raises `DataError`, or is added to `skipped` if that is given. A file that cannot be read to its
    end, or that lacks a required column, raises `DataError` either way.
    """
    _check_columns(path)
    yield from read_with(_sample_of_row, path, ".parquet", skipped)


def outside_images(path: Path) -> Iterator[str]:
    """The paths in a Parquet file of samples that lead to images outside of its folder. Raises `DataError`."""
    pyarrow, parquet = _arrow()
    try:
        with path.open("rb") as stream:
            for batch in parquet.ParquetFile(stream).iter_batches(columns=["images.list.element.path"]):
                for images in batch.column("images").to_pylist():
                    names = (image["path"] for image in images or ())
                    yield from (name for name in names if name and _leads_outside(PurePath(name)))
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from error


def _leads_outside(path: PurePath) -> bool:
    return path.is_absolute() or ".." in path.parts


def _check_columns(path: Path) -> None:
    pyarrow, parquet = _arrow()
    try:
        with path.open("rb") as stream:
            columns = parquet.ParquetFile(stream).schema_arrow.names
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from error
    if missing := [name for name in _NEEDED if name not in columns]:
        raise DataError(f"{path}: no column {missing[0]!r}; add it: samples need {', '.join(_NEEDED)}")


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    return pyarrow, parquet


def _arrow_schema(pyarrow: Any) -> Any:
    """The columns; the metadata tells Hugging Face `datasets` which of them are images."""
    text = pyarrow.string()
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])
    fields = [(name, text) for name in _TEXTS] + [("images", pyarrow.list_(image)), ("meta", text)]
    features: dict[str, Any] = {name: {"dtype": "string", "_type": "Value"} for name in (*_TEXTS, "meta")}
    features["images"] = {"feature": {"_type": "Image"}, "_type": "List"}
    ordered = {name: features[name] for name, _ in fields}
    metadata = {"huggingface": json.dumps({"info": {"features": ordered}}), "guardreasoner_vl": str(SCHEMA)}
    return pyarrow.schema(fields, metadata=metadata)


def _parquet_row(sample: Sample, folder: Path, embed: bool) -> dict[str, Any]:
    content = sample.model_dump(mode="json")
    content["images"] = [_image_cell(Path(path), folder, embed) for path in sample.images]
    content["meta"] = json.dumps(sample.meta, ensure_ascii=False)
    return content


def _image_cell(path: Path, folder: Path, embed: bool) -> dict[str, Any]:
    if embed:
        try:
            return {"bytes": path.read_bytes(), "path": path.name}
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); restore it or drop the row") from error
    absolute, root = path.absolute(), folder.absolute()
    return {"bytes": None, "path": str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)}


def _sample_of_row(row: Record, folder: Path) -> Sample:
    """Missing columns and nulls become the field's default. Raises `NotASampleError`."""
    if medium := unread_medium(row, ("images",)):
        raise NotASampleError(f"{medium!a:.40}: not a field of a sample; use images")
    fields = {name: value for name, value in row.items() if value is not None or name in _NEEDED}
    return made_from({**fields, "images": _located_images(row, folder), "meta": _meta(row)})


def _located_images(row: Record, folder: Path) -> list[str]:
    images = row.get("images")
    if not isinstance(images, list | None):
        raise NotASampleError("images: not a list of images")
    return [_path_of_image(image, folder) for image in images or ()]


def _path_of_image(image: object, folder: Path) -> str:
    """The path of one image: an embedded image is unpacked, a plain path is resolved."""
    name = image.get("path") if isinstance(image, dict) else image
    if isinstance(image, dict) and image.get("bytes"):
        return unpack_image(image, folder / IMAGES)
    if not isinstance(name, str) or not name:
        raise NotASampleError("images: neither an image's bytes nor its path")
    if fault := file_name_fault(name):
        raise NotASampleError(f"images: {fault}")
    return str(folder / name)


def _meta(row: Record) -> Any:
    """`meta` as a mapping; JSON text is parsed."""
    meta = row.get("meta")
    try:
        return json.loads(meta or "{}") if isinstance(meta, str | None) else meta
    except (ValueError, RecursionError) as error:
        raise NotASampleError("meta: not JSON") from error
