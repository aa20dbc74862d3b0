"""A corpus on disk: `rows.parquet`, what is known about it, and what was written about its rows later.

DIR/rows.parquet       one row for each sample, the images inside or by path
DIR/corpus.json        schema version, recipe's name, sources with their licences and revisions
DIR/reasoning.jsonl    attempts of a teacher, appended by `synthesize` (`corpus.attempts`)
DIR/set_aside.jsonl    rows that were left out, each with its reason
DIR/images/          images that stood inside records or rows, named after their bytes
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from guardreasoner_vl.corpus.attempts import REASONING, kept
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.sources.mixture import Mixture
from guardreasoner_vl.sources.parquet import SCHEMA, read_rows, write_rows
from guardreasoner_vl.sources.repeats import times
from guardreasoner_vl.storage.atomic import write_json
from guardreasoner_vl.types import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from guardreasoner_vl.sources.skipped import SetAside
    from guardreasoner_vl.types import Sample

ROWS, INFO, SET_ASIDE = "rows.parquet", "corpus.json", "set_aside.jsonl"


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
            raise DataError(
                f"{folder}: a corpus of version {version!r:.20}, this program reads {SCHEMA}; curate it again"
            )
        return CorpusInfo.model_validate(content)
    except OSError as error:
        raise DataError(f"{folder}: no {INFO} in it; give a folder that `curate --out` wrote") from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise DataError(f"{folder / INFO}: not a corpus's description; curate it again") from error


def write_corpus(folder: Path, info: CorpusInfo, samples: Iterable[Sample], *, embed: bool = False) -> CorpusInfo:
    """Write rows and description, whole or not at all; `embed` puts the images' bytes into the rows."""
    written = info.model_copy(update={"rows": write_rows(folder / ROWS, samples, embed=embed)})
    write_json(folder / INFO, written.model_dump(mode="json"))
    return written


def read_corpus(folder: Path, set_aside: SetAside | None = None) -> Iterator[Sample]:
    """Stream the rows, with the reasoning and labels that a teacher wrote since.

    Raises `DataError`, also for a broken row unless `set_aside` is given, which then names it.
    """
    read_info(folder)
    later = kept(folder / REASONING)
    for sample in read_rows(folder / ROWS, set_aside):
        attempt = later.get(sample.id)
        yield attempt.applied(sample) if attempt else sample


def read_split(folder: Path, split: str) -> Iterator[Sample]:
    """The rows of one split."""
    return (sample for sample in read_corpus(folder) if sample.split == split)


def read_mixture(folder: Path) -> Mixture:
    """The rows as training takes them: those of the split `train`, as often as the recipe repeats their source."""
    mixture = Mixture()
    for sample in read_corpus(folder):
        if sample.split == "train":
            mixture.train += [sample] * times(sample)
        else:
            (mixture.held_out if sample.split == "validation" else mixture.test).append(sample)
    return mixture
