"""Curation: build one corpus from a recipe's sources, without duplicates and without rows of the evaluation sets.

    sources -> mixture (shares, splits, labels) -> duplicates and decontamination -> rendered, joined and varied rows
            -> balance -> DIR

Rows that cannot be used are named in `DIR/skipped.jsonl` with their reasons, and nothing else is lost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.corpus.store import SKIPPED, CorpusInfo, SourceInfo, write_corpus
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
from guardreasoner_vl.sources.rendered import SOURCE as RENDERED
from guardreasoner_vl.storage.atomic import write_json, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator
    from pathlib import Path

    from guardreasoner_vl.recipe import DataSection, Recipe, SourceSection
    from guardreasoner_vl.sources.skipped import SkippedRows
    from guardreasoner_vl.types import Sample

REPORT = "curation.json"


@dataclass(frozen=True)
class CurationReport:
    """The result of a curation.

    `read` counts the sources' rows, `derived` those rendered, joined and varied from them, `unbalanced` those that the
    balance dropped; `skipped` names the unusable ones.
    """

    info: CorpusInfo
    read: int
    derived: int
    unbalanced: int
    skipped: SkippedRows


def run(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    embed: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> CurationReport:
    """Write the corpus to `out`; `embed` puts the images into its rows.

    Raises `RecipeError` if `out` holds another recipe, `DataError` if no row remains or another process works there.
    """
    with open_run_dir(out, recipe, "curate"):
        return _curated(recipe, data, out, embed, progress)


def _curated(
    recipe: Recipe, data: Path, out: Path, embed: bool, progress: Callable[[int, int | None], None] | None
) -> CurationReport:
    mixture = build_mixture(recipe.data, data, out, recipe.seed, curated=True)
    skipped = mixture.skipped
    splits = {"train": mixture.train, "validation": mixture.held_out, "test": mixture.test}
    rows = [row.model_copy(update={"split": split}) for split, part in splits.items() for row in part]
    read = len(rows) + skipped.total
    unlabelled = {source.title for source in recipe.data.sources if source.unlabelled}
    rows = list(_usable(rows, unlabelled, skipped))
    report: dict[str, object] = {}
    if recipe.data.duplicates:
        against = _evaluation_rows(recipe.data.duplicates, data, out)
        checked = without_duplicates(
            rows, against, text=recipe.data.duplicates.text, image=recipe.data.duplicates.image, progress=progress
        )
        rows = checked.kept
        for dropped in checked.dropped:
            skipped.add(dropped.reason, dropped.id)
        report["duplicates"] = checked.as_json()
    train, others = ([row for row in rows if (row.split == "train") == trained] for trained in (True, False))
    with_derived = extended(train, recipe.data, out, recipe.seed)
    derived, before = len(with_derived) - len(train), len(with_derived)
    train = balanced(with_derived, recipe.data.balance, recipe.seed) if recipe.data.balance else with_derived
    unbalanced = before - len(train)
    rows = [*train, *others]
    if not rows:
        raise DataError(f"{data}: no row remains (skipped: {skipped.reasons}); check data.sources")
    info = CorpusInfo(name=recipe.name, seed=recipe.seed, sources=_source_infos(recipe.data))
    write_whole(
        out / SKIPPED,
        (json.dumps({"id": name, "reason": reason}).encode() + b"\n" for name, reason in skipped.rows),
    )
    report |= {"read": read, "made": derived, "kept": len(rows), "left out by the balance": unbalanced}
    write_json(out / REPORT, {**report, "skipped": skipped.reasons})
    # The description is written last: a folder that has one is finished.
    return CurationReport(write_corpus(out, info, rows, embed=embed), read, derived, unbalanced, skipped)


def _usable(rows: Iterable[Sample], unlabelled: Container[str], skipped: SkippedRows) -> Iterator[Sample]:
    """Rows with content, a unique id, and a label unless their source is declared unlabelled."""
    ids: set[str] = set()
    for row in rows:
        if row.id in ids:
            skipped.add("repeated id", row.id)
        elif not (row.has_request or row.has_response):
            skipped.add("nothing to judge", row.id)
        elif not (row.request_label or row.response_label or row.source in unlabelled):
            skipped.add("no label", row.id)
        else:
            ids.add(row.id)
            yield row


def _evaluation_rows(section: DuplicatesSection, data: Path, out: Path) -> list[Sample]:
    loaded = find(section.against, str(data), out / IMAGES) if section.against else []
    return [sample for benchmark in loaded for sample in benchmark.samples]


def _source_infos(data: DataSection) -> tuple[SourceInfo, ...]:
    sources = tuple(_source(source) for source in data.sources)
    licences = ", ".join(dict.fromkeys(source.licence for source in sources))
    derived = ((RENDERED, data.rendered, "drawn"), (JOINED, data.joined, "joined"))
    return sources + tuple(
        SourceInfo(name=name, origin=f"{verb} from the other rows", licence=licences)
        for name, section, verb in derived
        if section
    )


def _source(source: SourceSection) -> SourceInfo:
    adapter = None if source.adapter == SAMPLES else adapter_named(source.adapter)
    return SourceInfo(
        name=source.title,
        origin=source.origin or (adapter.origin if adapter else ""),
        licence=source.licence or (adapter.licence if adapter else ""),
        revision=revision_of(source.folder),
    )
