"""Curation: a recipe's sources become one corpus, without duplicates and without rows of the evaluation sets.

    sources -> mixture (shares, splits, labels) -> duplicates and decontamination -> joined and varied -> balance -> DIR

Rows that cannot be used are named in `DIR/set_aside.jsonl` with their reasons, and nothing else is lost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.corpus.store import SET_ASIDE, CorpusInfo, SourceInfo, write_corpus
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.benchmarks.find import find
from guardreasoner_vl.recipe import SAMPLES, DuplicatesSection
from guardreasoner_vl.recipe.run_dir import open_run_dir
from guardreasoner_vl.sources.balance import balanced
from guardreasoner_vl.sources.catalogue import adapter_named
from guardreasoner_vl.sources.duplicates import without_duplicates
from guardreasoner_vl.sources.joined import SOURCE as JOINED
from guardreasoner_vl.sources.locate import revision_of
from guardreasoner_vl.sources.mixture import build_mixture, extended
from guardreasoner_vl.sources.parquet import IMAGES
from guardreasoner_vl.storage.atomic import write_json, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator
    from pathlib import Path

    from guardreasoner_vl.recipe import DataSection, Recipe, SourceSection
    from guardreasoner_vl.sources.skipped import SetAside
    from guardreasoner_vl.types import Sample

REPORT = "curation.json"


@dataclass(frozen=True)
class Curated:
    """What came of a recipe: rows read, made of those, kept and left out by the balance; `set_aside` names others."""

    info: CorpusInfo
    read: int
    made: int
    unbalanced: int
    set_aside: SetAside


def run(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    embed: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Curated:
    """Write the corpus to `out`; `embed` puts the images into its rows.

    Raises `RecipeError` if `out` holds another recipe, `DataError` if nothing is left or another process works there.
    """
    with open_run_dir(out, recipe, "curate"):
        return _curated(recipe, data, out, embed, progress)


def _curated(
    recipe: Recipe, data: Path, out: Path, embed: bool, progress: Callable[[int, int | None], None] | None
) -> Curated:
    mixture = build_mixture(recipe.data, data, out, recipe.seed, curated=True)
    set_aside = mixture.set_aside
    splits = {"train": mixture.train, "validation": mixture.held_out, "test": mixture.test}
    rows = [row.model_copy(update={"split": split}) for split, part in splits.items() for row in part]
    read = len(rows) + set_aside.total
    unlabelled = {source.title for source in recipe.data.sources if source.unlabelled}
    rows = list(_usable(rows, unlabelled, set_aside))
    report: dict[str, object] = {}
    if recipe.data.duplicates:
        against = _evaluation_rows(recipe.data.duplicates, data, out)
        found = without_duplicates(
            rows, against, text=recipe.data.duplicates.text, image=recipe.data.duplicates.image, progress=progress
        )
        rows = found.kept
        for dropped in found.dropped:
            set_aside.add(dropped.reason, dropped.id)
        report["duplicates"] = found.as_json()
    train, others = ([row for row in rows if (row.split == "train") == trained] for trained in (True, False))
    with_made = extended(train, recipe.data, recipe.seed)
    made, before = len(with_made) - len(train), len(with_made)
    train = balanced(with_made, recipe.data.balance, recipe.seed) if recipe.data.balance else with_made
    unbalanced = before - len(train)
    rows = [*train, *others]
    if not rows:
        raise DataError(f"{data}: no row is left (set aside: {set_aside.reasons}); check data.sources")
    info = CorpusInfo(name=recipe.name, seed=recipe.seed, sources=_described(recipe.data))
    write_whole(
        out / SET_ASIDE,
        (json.dumps({"id": name, "reason": reason}).encode() + b"\n" for name, reason in set_aside.rows),
    )
    report |= {"read": read, "made": made, "kept": len(rows), "left out by the balance": unbalanced}
    write_json(out / REPORT, {**report, "set aside": set_aside.reasons})
    # The description is written last, so that a folder with one is finished.
    return Curated(write_corpus(out, info, rows, embed=embed), read, made, unbalanced, set_aside)


def _usable(rows: Iterable[Sample], unlabelled: Container[str], set_aside: SetAside) -> Iterator[Sample]:
    """Rows with content, an id of their own, and a label unless their source may lack them."""
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            set_aside.add("its id stands there already", row.id)
        elif not (row.prompt.strip() or row.images or (row.response or "").strip()):
            set_aside.add("nothing to judge", row.id)
        elif not (row.request_label or row.response_label or row.source in unlabelled):
            set_aside.add("no label", row.id)
        else:
            seen.add(row.id)
            yield row


def _evaluation_rows(section: DuplicatesSection, data: Path, out: Path) -> list[Sample]:
    loaded = find(section.against, str(data), out / IMAGES) if section.against else []
    return [sample for one in loaded for sample in one.samples]


def _described(data: DataSection) -> tuple[SourceInfo, ...]:
    sources = tuple(_source(source) for source in data.sources)
    if data.joined:
        licences = dict.fromkeys(source.licence for source in sources)
        sources += (SourceInfo(name=JOINED, origin="joined from the other rows", licence=", ".join(licences)),)
    return sources


def _source(source: SourceSection) -> SourceInfo:
    adapter = None if source.adapter == SAMPLES else adapter_named(source.adapter)
    return SourceInfo(
        name=source.title,
        origin=source.origin or (adapter.origin if adapter else ""),
        licence=source.licence or (adapter.licence if adapter else ""),
        revision=revision_of(source.folder),
    )
