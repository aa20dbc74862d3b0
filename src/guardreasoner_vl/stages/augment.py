"""Augmentation: add to the hard rows pairs of them joined into one row (paper, section 3.3; `rl.concatenation`).

    hard rows -> pairs drawn at random -> merged images -> RL set: hard rows, then joined ones

OUT is a corpus (`corpus.store`); `augment.json` holds the counts, and a contact sheet shows some of the joined rows.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import chain, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.corpus.attempts import REASONING
from guardreasoner_vl.corpus.contact_sheet import parent_modalities, write_sheet
from guardreasoner_vl.corpus.store import (
    INFO,
    ROWS,
    CorpusInfo,
    SourceInfo,
    is_corpus,
    read_corpus,
    read_info,
    write_corpus,
)
from guardreasoner_vl.errors import DataError, ImageError
from guardreasoner_vl.images.decode import decoded_images
from guardreasoner_vl.images.geometry import MERGED_PIXELS, merge_images
from guardreasoner_vl.rl.concatenation import SOURCE, Pair, concatenated, drawn_pairs
from guardreasoner_vl.sources.parquet import IMAGES
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.sources.union import class_of, made_for
from guardreasoner_vl.storage.atomic import write_json, writing
from guardreasoner_vl.storage.lock import locked_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from PIL import Image

    from guardreasoner_vl.recipe import Recipe
    from guardreasoner_vl.types import Sample

REPORT = "augment.json"
MADE_FROM = "made from"
UNLABELLED, UNREADABLE, THIN = "no label is known", "unreadable image", "the merged image is too thin"
_TRIES = 100
"""At most this many pairs are tried for each joined row wanted."""


@dataclass(frozen=True)
class AugmentReport:
    """The result of an augmentation; rows of other splits are copied and not counted.

    `augmented` is less than `wanted` where the pairs ran out. `kinds` counts joined rows by their parents'
    modalities, `labels` by joint label; `before` and `after` count rows by class, and `skipped` pairs by reason.
    """

    hard: int
    wanted: int
    augmented: int
    kinds: dict[str, int]
    labels: dict[str, int]
    before: dict[str, int]
    after: dict[str, int]
    skipped: dict[str, int]

    @property
    def missing(self) -> int:
        """How many of the wanted joined rows could not be made."""
        return self.wanted - self.augmented


def run(
    recipe: Recipe, hard: Path, out: Path, *, progress: Callable[[int, int | None], None] | None = None
) -> AugmentReport:
    """Write the RL set of the corpus `hard` to `out`, unless a finished run wrote it already.

    It is written again if the hard rows, the seed or the recipe's section have changed. Raises `DataError` if there are
    too few rows, if `out` holds a corpus that this stage did not make, or if another process works there.
    """
    with locked_folder(out, "augment"):
        return _augmentation(recipe, hard, out, progress)


def _augmentation(
    recipe: Recipe, hard: Path, out: Path, progress: Callable[[int, int | None], None] | None
) -> AugmentReport:
    read_info(hard)
    _check_folders(hard, out)
    made_from: dict[str, Any] = {
        "augment": recipe.augment.model_dump(mode="json"),
        "seed": recipe.seed,
        "rows": _digest_of_files(hard / ROWS, hard / REASONING),
    }
    if largest := _max_pixels(recipe):
        made_from["max_pixels"] = largest
    if earlier := _earlier(out, made_from):
        return earlier
    rows = list(read_corpus(hard))
    parents = [row for row in rows if row.split == "train"]
    if not parents:
        raise DataError(f"{hard}: no hard row to train on; mine more of the corpus, or with mine.keep: mixed")
    if len(parents) < 2 and recipe.augment.share:
        raise DataError(f"{hard}: one row makes no pair; mine more of the corpus, or set augment.share to 0")
    wanted = made_for(len(parents), recipe.augment.share)
    # The description is written last: a folder that has one is finished.
    (out / IMAGES).mkdir(parents=True, exist_ok=True)
    (out / INFO).unlink(missing_ok=True)
    skipped = SkippedRows()
    augmented = []
    for sample in islice(_augmented(parents, wanted, recipe, out / IMAGES, skipped), wanted):
        augmented.append(sample)
        if progress:
            progress(len(augmented), wanted)
    report = _augment_report(parents, augmented, wanted, skipped)
    write_sheet(
        out, augmented, f"{len(augmented):,} of {wanted:,} joined rows, in addition to {report.hard:,} hard ones."
    )
    write_json(out / REPORT, {MADE_FROM: made_from, **asdict(report)})
    write_corpus(out, _corpus_info(recipe, hard, bool(augmented)), chain(rows, augmented))
    return report


def _max_pixels(recipe: Recipe) -> int | None:
    """The most pixels of an image, to which the guard would shrink a merged one; None if the recipe has no model."""
    return recipe.model.max_pixels if recipe.model else None


def _check_folders(hard: Path, out: Path) -> None:
    if (hard / REPORT).is_file():
        raise DataError(f"{hard}: augmented already; give the folder of the hard rows")
    if is_corpus(out) and not (out / REPORT).is_file():
        raise DataError(f"{out}: holds a corpus that `augment` did not make; give another folder")


def _digest_of_files(*files: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _earlier(out: Path, made_from: dict[str, Any]) -> AugmentReport | None:
    """The report of a finished run with the same rows and settings, if there is one."""
    if not is_corpus(out):
        return None
    try:
        content = json.loads((out / REPORT).read_text("utf-8"))
        return AugmentReport(**content) if content.pop(MADE_FROM) == made_from else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _corpus_info(recipe: Recipe, hard: Path, augmented: bool) -> CorpusInfo:
    sources = read_info(hard).sources
    if augmented:
        licences = dict.fromkeys(source.licence for source in sources)
        sources += (SourceInfo(name=SOURCE, origin="pairs of the other rows", licence=", ".join(licences)),)
    return CorpusInfo(name=recipe.name, seed=recipe.seed, sources=sources)


def _augmented(
    parents: Sequence[Sample], wanted: int, recipe: Recipe, folder: Path, skipped: SkippedRows
) -> Iterator[Sample]:
    """Joined rows until the pairs run out; if balanced, unharmful and harmful ones alternate."""
    unreadable: set[str] = set()
    largest = _max_pixels(recipe) or MERGED_PIXELS
    streams = []
    for outcome in ("unharmful", "harmful") if recipe.augment.balanced else (None,):
        pairs = drawn_pairs(parents, random.Random(f"{recipe.seed}-augment-{outcome}"), outcome)
        streams.append(_made(islice(pairs, _TRIES * wanted), folder, unreadable, skipped, largest))
    for stream in cycle(streams):
        sample = next(stream, None)
        if sample is None:
            return
        yield sample


def _made(
    pairs: Iterator[Pair], folder: Path, unreadable: set[str], skipped: SkippedRows, max_pixels: int
) -> Iterator[Sample]:
    """The joined rows of all pairs that can be joined; images of at most `max_pixels` are written to `folder`."""
    for pair in pairs:
        image = folder / f"{pair.name}.png" if pair.merges else None
        sample = concatenated(pair, str(image) if image else None)
        if sample.request_label is None and sample.response_label is None:
            skipped.add(UNLABELLED)
            continue
        views = [view for row in (pair.first, pair.second) for view in _views(row, unreadable)]
        if unreadable & {pair.first.id, pair.second.id}:
            skipped.add(UNREADABLE)
            continue
        if image:
            try:
                merged = reduce(lambda first, second: merge_images(first, second, pair.layout, max_pixels), views)
            except ImageError:
                skipped.add(THIN)
                continue
            with writing(image):
                merged.save(image, compress_level=1)
        yield sample


def _views(row: Sample, unreadable: set[str]) -> list[Image.Image]:
    """All images that the guard would see of a row: each frame in every variant, as any of them may carry the label."""
    if row.id in unreadable:
        return []
    try:
        return [view for image in row.images for view in decoded_images(Path(image))]
    except ImageError:
        unreadable.add(row.id)
        return []


def _augment_report(
    parents: Sequence[Sample], augmented: Sequence[Sample], wanted: int, skipped: SkippedRows
) -> AugmentReport:
    labels: Counter[str] = Counter()
    for row in augmented:
        labels[f"request {row.request_label or ('unknown' if row.has_request else 'absent')}"] += 1
        labels[f"response {row.response_label or ('unknown' if row.has_response else 'absent')}"] += 1
    before, joint = (Counter(str(class_of(row) or "unknown") for row in rows) for rows in (parents, augmented))
    return AugmentReport(
        hard=len(parents),
        wanted=wanted,
        augmented=len(augmented),
        kinds=_sorted(Counter(map(parent_modalities, augmented))),
        labels=_sorted(labels),
        before=_sorted(before),
        after=_sorted(before + joint),
        skipped=_sorted(skipped.reasons),
    )


def _sorted(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))
