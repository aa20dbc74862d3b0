"""A corpus on disk: `rows.parquet`, what is known about it, and what was written about its rows later.

    DIR/rows.parquet       one row for each sample, the pictures inside or by path
    DIR/corpus.json        schema version, recipe's name, sources with their licences and revisions
    DIR/reasoning.jsonl    attempts of a teacher, appended by `synthesize` (`corpus.attempts`)
    DIR/set_aside.jsonl    rows that were left out, each with its reason
    DIR/pictures/          pictures that stood inside records or rows, named after their bytes

`datasets.load_dataset("parquet", data_files="DIR/rows.parquet")` reads the rows too, with the pictures decoded.
"""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from guardreasoner_vl.corpus.attempts import REASONING, kept
from guardreasoner_vl.errors import DataError, MissingExtraError
from guardreasoner_vl.run_dir import write_json
from guardreasoner_vl.sources.records import unpack_picture
from guardreasoner_vl.types import Frozen, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SCHEMA = 1
ROWS, INFO, SET_ASIDE, PICTURES = "rows.parquet", "corpus.json", "set_aside.jsonl", "pictures"
_TEXTS = ("id", "source", "split", "modality", "prompt", "response", "request_label", "response_label", "reasoning")
_BATCH = 256


class SourceInfo(Frozen):
    """Where rows came from, and under which terms."""

    name: str
    origin: str
    licence: str
    revision: str | None = None


class CorpusInfo(Frozen):
    """What is known about a corpus. `version` is that of the rows' columns."""

    version: int = SCHEMA
    name: str
    seed: int = 0
    sources: tuple[SourceInfo, ...] = ()
    rows: int = Field(default=0, ge=0)


def is_corpus(folder: Path) -> bool:
    """Whether a corpus lies there."""
    return (folder / INFO).is_file()


def read_info(folder: Path) -> CorpusInfo:
    """Raises `DataError` if there is no corpus, or one of another version."""
    try:
        content = json.loads((folder / INFO).read_text("utf-8"))
        version = content["version"]
        if version != SCHEMA:
            raise DataError(f"{folder}: a corpus of version {version!r:.20}, this program reads {SCHEMA}; curate it again")
        return CorpusInfo.model_validate(content)
    except OSError as error:
        raise DataError(f"{folder}: no {INFO} in it; give a folder that `curate --out` wrote") from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise DataError(f"{folder / INFO}: not a corpus's description; curate it again") from error


def write_corpus(folder: Path, info: CorpusInfo, samples: Iterable[Sample], *, embed: bool = False) -> CorpusInfo:
    """Write the rows, whole or not at all; `embed` puts the pictures' bytes into them. Raises `DataError`.

    Pictures by reference are paths relative to `folder` where they lie below it, absolute ones elsewhere.
    """
    pyarrow, parquet = _arrow()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{ROWS}.{os.getpid()}.partial"
    stream, count = iter(samples), 0
    with parquet.ParquetWriter(partial, _schema(pyarrow), compression="zstd") as writer:
        while batch := list(islice(stream, _BATCH)):
            rows = [_row(sample, folder, embed) for sample in batch]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=_schema(pyarrow)))
            count += len(batch)
    partial.replace(folder / ROWS)
    written = info.model_copy(update={"rows": count})
    write_json(folder / INFO, written.model_dump(mode="json"))
    return written


def read_corpus(folder: Path) -> Iterator[Sample]:
    """Stream the rows, with the reasoning and labels that a teacher wrote since. Raises `DataError`."""
    read_info(folder)
    later = kept(folder / REASONING)
    for sample in read_rows(folder / ROWS):
        attempt = later.get(sample.id)
        yield attempt.applied(sample) if attempt else sample


def read_rows(path: Path) -> Iterator[Sample]:
    """Stream the samples of a Parquet file; pictures inside it are written to `pictures` beside it."""
    pyarrow, parquet = _arrow()
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=_BATCH):
            yield from (_sample(row, path.parent) for row in batch.to_pylist())
    except (OSError, pyarrow.ArrowException, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a corpus's rows ({type(error).__name__}); curate it again") from error


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
            raise DataError(f"{path}: cannot be read ({error.strerror}); run `corpus check`, or curate again") from error
    absolute, root = path.absolute(), folder.absolute()
    return {"bytes": None, "path": str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)}


def _sample(row: dict[str, Any], folder: Path) -> Sample:
    images = [
        unpack_picture(picture, folder / PICTURES) if picture["bytes"] else str(folder / picture["path"])
        for picture in row["images"] or ()
    ]
    return Sample.model_validate({**row, "images": images, "meta": json.loads(row["meta"] or "{}")})
