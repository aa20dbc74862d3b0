"""A corpus on disk.

DIR/rows.parquet       one row for each sample, with images embedded or referred to by path
DIR/corpus.json        schema version, recipe name, sources with their licences and revisions
DIR/reasoning.jsonl    attempts of a teacher, appended by `synthesize` (`corpus.attempts`)
DIR/skipped.jsonl      skipped rows, each with its reason
DIR/images/            images that were embedded in records or rows, named after their bytes
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from guardreasoner_vl.corpus.attempts import REASONING, kept
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.sources.mixture import Mixture
from guardreasoner_vl.sources.parquet import SCHEMA, read_parquet, write_parquet
from guardreasoner_vl.sources.repeats import times
from guardreasoner_vl.storage.atomic import write_json
from guardreasoner_vl.types import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from guardreasoner_vl.sources.skipped import SkippedRows
    from guardreasoner_vl.types import Sample

ROWS, INFO, SKIPPED = "rows.parquet", "corpus.json", "skipped.jsonl"


class SourceInfo(Frozen):
    """The origin of rows, and their licence."""

    name: str
    origin: str
    licence: str
    revision: str | None = None


class CorpusInfo(Frozen):
    """The description of a corpus; `version` is that of the rows' columns."""

    version: int = SCHEMA
    name: str
    seed: int = 0
    sources: tuple[SourceInfo, ...] = ()
    rows: int = Field(default=0, ge=0)


def is_corpus(folder: Path) -> bool:
    """Whether the folder holds a corpus."""
    return (folder / INFO).is_file()


def read_info(folder: Path) -> CorpusInfo:
    """The description of the corpus. Raises `DataError` if there is none, or one of another version."""
    try:
        content = json.loads((folder / INFO).read_text("utf-8"))
        version = content["version"]
        if version != SCHEMA:
            raise DataError(
                f"{folder}: the corpus has version {version!r:.20}, but version {SCHEMA} is needed; curate it again"
            )
        return CorpusInfo.model_validate(content)
    except OSError as error:
        raise DataError(f"{folder}: no {INFO} in it; give a folder that `curate --out` wrote") from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise DataError(f"{folder / INFO}: not a valid corpus description; curate it again") from error


def write_corpus(folder: Path, info: CorpusInfo, samples: Iterable[Sample], *, embed: bool = False) -> CorpusInfo:
    """Write rows and description, each atomically; `embed` stores the images' bytes in the rows."""
    written = info.model_copy(update={"rows": write_parquet(folder / ROWS, samples, embed=embed)})
    write_json(folder / INFO, written.model_dump(mode="json"))
    return written


def read_corpus(folder: Path, skipped: SkippedRows | None = None) -> Iterator[Sample]:
    """Stream the rows with the reasoning and labels that a teacher added.

    Raises `DataError`; an invalid row is added to `skipped` if that is given.
    """
    read_info(folder)
    later = kept(folder / REASONING)
    for sample in read_parquet(folder / ROWS, skipped):
        attempt = later.get(sample.id)
        yield attempt.applied(sample) if attempt else sample


def read_split(folder: Path, split: str) -> Iterator[Sample]:
    """The rows of one split."""
    return (sample for sample in read_corpus(folder) if sample.split == split)


def read_mixture(folder: Path) -> Mixture:
    """The rows by use: training rows repeated as often as the recipe says, validation rows and test rows."""
    mixture = Mixture()
    for sample in read_corpus(folder):
        if sample.split == "train":
            mixture.train += [sample] * times(sample)
        else:
            (mixture.held_out if sample.split == "validation" else mixture.test).append(sample)
    return mixture
