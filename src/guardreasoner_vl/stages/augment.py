"""Augmentation: the hard rows, and pairs of them joined into one (paper, section 3.3; `rl.concatenation`).

    hard rows -> pairs drawn at random -> merged images -> RL set: hard rows, then joined ones

OUT is a corpus (`corpus.store`); `augment.json` counts, and a contact sheet shows some of the joined rows.
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
from guardreasoner_vl.corpus.contact_sheet import kind_of, write_sheet
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
from guardreasoner_vl.images.geometry import merge
from guardreasoner_vl.rl.concatenation import SOURCE, Pair, drawn_pairs, joined
from guardreasoner_vl.sources.parquet import IMAGES
from guardreasoner_vl.sources.skipped import SetAside
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
"""Pairs that are looked at for each one wanted, at most."""


@dataclass(frozen=True)
class AugmentReport:
    """What came of the hard rows; other splits are passed on and not counted.

    `augmented` is less than `wanted` where the pairs ran out. `kinds` counts joined rows by their parents'
    modalities, `labels` by joint label; `before` and `after` count rows by class, and `set_aside` pairs by reason.
    """

    hard: int
    wanted: int
    augmented: int
    kinds: dict[str, int]
    labels: dict[str, int]
    before: dict[str, int]
    after: dict[str, int]
    set_aside: dict[str, int]

    @property
    def missing(self) -> int:
        """How many joined rows the set lacks."""
        return self.wanted - self.augmented


def run(
    recipe: Recipe, hard: Path, out: Path, *, progress: Callable[[int, int | None], None] | None = None
) -> AugmentReport:
    """Write the RL set of the corpus `hard` to `out`, unless it stands there already.

    It is made anew if the hard rows, the seed or the recipe's section have changed. Raises `DataError` if there are
    too few rows, if `out` holds a corpus that this stage did not make, or if another process works there.
    """
    with locked_folder(out, "augment"):
        return _augmentation(recipe, hard, out, progress)


def _augmentation(
    recipe: Recipe, hard: Path, out: Path, progress: Callable[[int, int | None], None] | None
) -> AugmentReport:
    read_info(hard)
    _check_folders(hard, out)
    made_from = {
        "augment": recipe.augment.model_dump(mode="json"),
        "seed": recipe.seed,
        "rows": _digest(hard / ROWS, hard / REASONING),
    }
    if earlier := _earlier(out, made_from):
        return earlier
    rows = list(read_corpus(hard))
    parents = [row for row in rows if row.split == "train"]
    if not parents:
        raise DataError(f"{hard}: no hard row to train on; mine more of the corpus, or with mine.keep: mixed")
    if len(parents) < 2 and recipe.augment.share:
        raise DataError(f"{hard}: one row makes no pair; mine more of the corpus, or set augment.share to 0")
    wanted = made_for(len(parents), recipe.augment.share)
    # The description is written last, so that a folder with one is finished.
    (out / IMAGES).mkdir(parents=True, exist_ok=True)
    (out / INFO).unlink(missing_ok=True)
    set_aside = SetAside()
    made = []
    for sample in islice(_augmented(parents, wanted, recipe, out / IMAGES, set_aside), wanted):
        made.append(sample)
        if progress:
            progress(len(made), wanted)
    report = _counted(parents, made, wanted, set_aside)
    write_sheet(out, made, f"{len(made):,} of {wanted:,} joined rows, beside {report.hard:,} hard ones.")
    write_json(out / REPORT, {MADE_FROM: made_from, **asdict(report)})
    write_corpus(out, _described(recipe, hard, bool(made)), chain(rows, made))
    return report


def _check_folders(hard: Path, out: Path) -> None:
    if (hard / REPORT).is_file():
        raise DataError(f"{hard}: augmented already; give the folder of the hard rows")
    if is_corpus(out) and not (out / REPORT).is_file():
        raise DataError(f"{out}: holds a corpus that `augment` did not make; give another folder")


def _digest(*files: Path) -> str:
    found = hashlib.sha256()
    for path in files:
        if path.is_file():
            with path.open("rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()


def _earlier(out: Path, made_from: dict[str, Any]) -> AugmentReport | None:
    """What a finished run of the same rows and settings reported."""
    if not is_corpus(out):
        return None
    try:
        content = json.loads((out / REPORT).read_text("utf-8"))
        return AugmentReport(**content) if content.pop(MADE_FROM) == made_from else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _described(recipe: Recipe, hard: Path, augmented: bool) -> CorpusInfo:
    sources = read_info(hard).sources
    if augmented:
        licences = dict.fromkeys(source.licence for source in sources)
        sources += (SourceInfo(name=SOURCE, origin="pairs of the other rows", licence=", ".join(licences)),)
    return CorpusInfo(name=recipe.name, seed=recipe.seed, sources=sources)


def _augmented(
    parents: Sequence[Sample], wanted: int, recipe: Recipe, folder: Path, set_aside: SetAside
) -> Iterator[Sample]:
    """Joined rows until the pairs run out; balanced, in turns an unharmful and a harmful one."""
    unreadable: set[str] = set()
    streams = []
    for outcome in ("unharmful", "harmful") if recipe.augment.balanced else (None,):
        pairs = drawn_pairs(parents, random.Random(f"{recipe.seed}-augment-{outcome}"), outcome)
        streams.append(_made(islice(pairs, _TRIES * wanted), folder, unreadable, set_aside))
    for stream in cycle(streams):
        sample = next(stream, None)
        if sample is None:
            return
        yield sample


def _made(pairs: Iterator[Pair], folder: Path, unreadable: set[str], set_aside: SetAside) -> Iterator[Sample]:
    """The rows that can be made of the pairs, their images written."""
    for pair in pairs:
        image = folder / f"{pair.name}.png" if pair.merges else None
        sample = joined(pair, str(image) if image else None)
        if sample.request_label is None and sample.response_label is None:
            set_aside.add(UNLABELLED)
            continue
        views = [view for row in (pair.first, pair.second) for view in _views(row, unreadable)]
        if unreadable & {pair.first.id, pair.second.id}:
            set_aside.add(UNREADABLE)
            continue
        if image:
            try:
                merged = reduce(lambda one, other: merge(one, other, pair.layout), views)
            except ImageError:
                set_aside.add(THIN)
                continue
            with writing(image):
                merged.save(image, compress_level=1)
        yield sample


def _views(row: Sample, unreadable: set[str]) -> list[Image.Image]:
    """All that the guard would be shown of a row, every frame in each of its readings, or its label may not hold."""
    if row.id in unreadable:
        return []
    try:
        return [view for image in row.images for view in decoded_images(Path(image))]
    except ImageError:
        unreadable.add(row.id)
        return []


def _counted(parents: Sequence[Sample], made: Sequence[Sample], wanted: int, set_aside: SetAside) -> AugmentReport:
    labels: Counter[str] = Counter()
    for row in made:
        exchange = row.exchange()
        labels[f"request {row.request_label or ('unknown' if exchange.has_prompt else 'absent')}"] += 1
        labels[f"response {row.response_label or ('unknown' if exchange.has_response else 'absent')}"] += 1
    before, joint = (Counter(str(class_of(row) or "unknown") for row in some) for some in (parents, made))
    return AugmentReport(
        hard=len(parents),
        wanted=wanted,
        augmented=len(made),
        kinds=_sorted(Counter(map(kind_of, made))),
        labels=_sorted(labels),
        before=_sorted(before),
        after=_sorted(before + joint),
        set_aside=_sorted(set_aside.reasons),
    )


def _sorted(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))
