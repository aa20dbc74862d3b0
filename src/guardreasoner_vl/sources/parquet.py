"""`Sample`s as the rows of a Parquet file, the pictures inside or by path.

`datasets.load_dataset("parquet", data_files=FILE)` reads it too, with the pictures decoded.
"""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import DataError, MissingExtraError
from guardreasoner_vl.sources.records import unpack_picture
from guardreasoner_vl.types import Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SCHEMA = 1
"""Version of the columns."""

PICTURES = "pictures"
"""Below a file's folder: pictures that stood inside its rows."""

_TEXTS = ("id", "source", "split", "modality", "prompt", "response", "request_label", "response_label", "reasoning")
_BATCH = 256


def write_rows(path: Path, samples: Iterable[Sample], *, embed: bool = False) -> int:
    """Write the rows, whole or not at all, and give their number; `embed` puts the pictures' bytes into them.

    Pictures by reference are paths relative to the file where they lie below its folder, absolute ones elsewhere.
    Raises `DataError` for a picture that cannot be read.
    """
    pyarrow, parquet = _arrow()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    schema, stream, count = _schema(pyarrow), iter(samples), 0
    try:
        with parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
            while batch := list(islice(stream, _BATCH)):
                rows = [_row(sample, path.parent, embed) for sample in batch]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                count += len(batch)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def read_rows(path: Path) -> Iterator[Sample]:
    """Stream the samples of a Parquet file; pictures inside it are written to `pictures` beside it."""
    pyarrow, parquet = _arrow()
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=_BATCH):
            yield from (_sample(row, path.parent) for row in batch.to_pylist())
    except (OSError, pyarrow.ArrowException, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not rows of samples ({type(error).__name__}); write the file again") from error


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    return pyarrow, parquet


def _schema(pyarrow: Any) -> Any:
    """The columns; the metadata tells the hub's `datasets` which of them are pictures."""
    text = pyarrow.string()
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])
    fields = [(name, text) for name in _TEXTS] + [("images", pyarrow.list_(picture)), ("meta", text)]
    features: dict[str, Any] = {name: {"dtype": "string", "_type": "Value"} for name in (*_TEXTS, "meta")}
    features["images"] = {"feature": {"_type": "Image"}, "_type": "List"}
    ordered = {name: features[name] for name, _ in fields}
    told = {"huggingface": json.dumps({"info": {"features": ordered}}), "guardreasoner_vl": str(SCHEMA)}
    return pyarrow.schema(fields, metadata=told)


def _row(sample: Sample, folder: Path, embed: bool) -> dict[str, Any]:
    content = sample.model_dump(mode="json")
    content["images"] = [_picture(Path(path), folder, embed) for path in sample.images]
    content["meta"] = json.dumps(sample.meta, ensure_ascii=False)
    return content


def _picture(path: Path, folder: Path, embed: bool) -> dict[str, Any]:
    if embed:
        try:
            return {"bytes": path.read_bytes(), "path": path.name}
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); restore it, or leave the row out") from error
    absolute, root = path.absolute(), folder.absolute()
    return {"bytes": None, "path": str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)}


def _sample(row: dict[str, Any], folder: Path) -> Sample:
    images = [
        unpack_picture(picture, folder / PICTURES) if picture["bytes"] else str(folder / picture["path"])
        for picture in row["images"] or ()
    ]
    return Sample.model_validate({**row, "images": images, "meta": json.loads(row["meta"] or "{}")})
