"""Remove duplicates, contradictory rows and rows of the evaluation sets from a corpus.

    every image decoded -> rows of the evaluation sets -> exact duplicates -> near duplicates

Rows are compared by their whole content (`fingerprints`), and the first of several duplicates stays. Exact duplicates
with contradictory labels are all skipped; near duplicates with contradictory labels all stay, since they may be a
contrast pair. Candidates for near texts come from MinHash bands (Leskovec, Rajaraman and Ullman, *Mining of Massive
Datasets*, chapter 3), for near images from parts of their hashes; the exact Jaccard index and Hamming distance decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sized
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from guardreasoner_vl.errors import InputError, MissingExtraError
from guardreasoner_vl.sources.fingerprints import HASH_BITS, fingerprints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from guardreasoner_vl.sources.fingerprints import Fingerprint, Fingerprinted
    from guardreasoner_vl.types import Sample

EXACT, NEAR, CONTRADICTORY = "exact duplicate", "near duplicate", "contradictory labels"
UNREADABLE = "unreadable image"
ProgressCallback: TypeAlias = "Callable[[int, int | None], None]"
_LABELS = ("request_label", "response_label")
_PERMUTATIONS = 64
_MAX_MISS_RATE = 0.01  # LSH may miss at most 1% of the pairs exactly at the threshold
_STEP = 256  # rows between two progress reports


@dataclass(frozen=True)
class Dropped:
    """A dropped row; `other` is the id of the row of the corpus or evaluation set that it matches."""

    id: str
    reason: str
    other: str | None = None


@dataclass(frozen=True)
class Deduplicated:
    """The rows kept and dropped, each in input order.

    `labels_merged` counts the labels that kept rows took from exact duplicates. `unread` has the ids of evaluation
    rows that were not compared, because an image of theirs cannot be decoded.
    """

    kept: list[Sample]
    dropped: list[Dropped]
    labels_merged: int
    unread: list[str]

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were dropped for each reason."""
        return dict(Counter(row.reason for row in self.dropped))

    def as_json(self) -> dict[str, Any]:
        """Plain data; the kept rows are given as a count."""
        return {
            "kept": len(self.kept),
            "reasons": self.reasons,
            "labels_merged": self.labels_merged,
            "unread_evaluation_rows": self.unread,
            "dropped": [asdict(row) for row in self.dropped],
        }


def without_duplicates(
    samples: Iterable[Sample],
    against: Iterable[Sample] = (),
    *,
    text: float = 0.8,
    image: int = 4,
    progress: ProgressCallback | None = None,
) -> Deduplicated:
    """Drop duplicates, contradictions, and rows whose request is that of a row of the evaluation sets `against`.

    Near: texts with a Jaccard index of at least `text`, images whose hashes differ in at most `image` of 64 bits.
    `progress(done, total)` counts rows, evaluation rows first; `total` is None for a stream. Raises `InputError`,
    `MissingExtraError`.
    """
    if not (0 < text <= 1 and 0 <= image < HASH_BITS):
        raise InputError(
            f"duplicates: text must be in (0, 1] and image in 0 to 63 bits, got text={text} and image={image}"
        )
    evaluation = list(against)
    total = len(evaluation) + len(samples) if isinstance(samples, Sized) else None
    stream = _with_progress(fingerprints(chain(evaluation, samples)), total, progress)
    evaluation_index = EvaluationIndex(NearIndex(text, image))
    for sample, fingerprint in islice(stream, len(evaluation)):
        evaluation_index.add(sample, fingerprint)

    rows: list[Sample] = []
    prints: dict[int, Fingerprint] = {}
    dropped: dict[int, Dropped] = {}
    for number, (sample, fingerprint) in enumerate(stream):
        rows.append(sample)
        if fingerprint is None:
            dropped[number] = Dropped(sample.id, UNREADABLE)
        elif reason := evaluation_index.reason(fingerprint.request()):
            dropped[number] = Dropped(sample.id, *reason)
        else:
            prints[number] = fingerprint

    once = _without_exact(rows, prints, dropped)
    kept = _without_near(once, prints, NearIndex(text, image), dropped)
    gained = sum(getattr(row, name) != getattr(rows[number], name) for number, row in kept.items() for name in _LABELS)
    in_order = [dropped[number] for number in sorted(dropped)]
    return Deduplicated(list(kept.values()), in_order, gained, evaluation_index.unread)


def _with_progress(
    rows: Iterator[Fingerprinted], total: int | None, progress: ProgressCallback | None
) -> Iterator[Fingerprinted]:
    done = 0
    for done, row in enumerate(rows, 1):
        yield row
        if progress and done % _STEP == 0:
            progress(done, total)
    if progress and done % _STEP:
        progress(done, total)


def _without_exact(
    rows: Sequence[Sample], prints: dict[int, Fingerprint], dropped: dict[int, Dropped]
) -> dict[int, Sample]:
    """The first row of each distinct content, by its number, with the labels of all its duplicates merged in."""
    groups: dict[bytes, list[int]] = {}
    for number, fingerprint in prints.items():
        groups.setdefault(fingerprint.key, []).append(number)
    once = {}
    for first, *others in groups.values():
        group = [rows[number] for number in (first, *others)]
        labels = {name: {label for row in group if (label := getattr(row, name))} for name in _LABELS}
        if any(len(values) > 1 for values in labels.values()):
            for number in (first, *others):
                # A row without the disputed label contradicts no other: name any other row of the group.
                stand_in = group[1] if number == first else group[0]
                other = next((row for row in group if contradict(row, rows[number])), stand_in)
                dropped[number] = Dropped(rows[number].id, CONTRADICTORY, other.id)
            continue
        merged = {name: next(iter(values), None) for name, values in labels.items()}
        once[first] = rows[first].model_copy(update=merged) if others else rows[first]
        dropped.update((number, Dropped(rows[number].id, EXACT, rows[first].id)) for number in others)
    return once


def _without_near(
    once: dict[int, Sample], prints: dict[int, Fingerprint], index: NearIndex, dropped: dict[int, Dropped]
) -> dict[int, Sample]:
    """Drop each row that is near an earlier kept row, unless their labels contradict."""
    kept: dict[int, Sample] = {}
    numbers: list[int] = []
    for number, row in once.items():
        near = (kept[numbers[position]] for position in index.near(prints[number]))
        other = next((earlier for earlier in near if not contradict(earlier, row)), None)
        if other:
            dropped[number] = Dropped(row.id, NEAR, other.id)
        else:
            kept[number] = row
            numbers.append(number)
            index.add(prints[number])
    return kept


def contradict(first: Sample, second: Sample) -> bool:
    """Whether both rows have a label for the request, or for the response, and these differ."""
    pairs = ((getattr(first, name), getattr(second, name)) for name in _LABELS)
    return any(label and other and label != other for label, other in pairs)


@dataclass
class EvaluationIndex:
    """Index of the evaluation sets' requests; `unread` has the ids of rows whose images cannot be decoded."""

    index: NearIndex
    rows: list[Sample] = field(default_factory=list)
    exact: dict[bytes, Sample] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def add(self, sample: Sample, fingerprint: Fingerprint | None) -> None:
        """Add an evaluation row; its fingerprint is None if an image cannot be decoded."""
        if fingerprint is None:
            self.unread.append(sample.id)
            return
        request = fingerprint.request()
        if request.key not in self.exact:
            self.exact[request.key] = sample
            self.rows.append(sample)
            self.index.add(request)

    def reason(self, request: Fingerprint) -> tuple[str, str] | None:
        """Why a row with this request is dropped, and the id of the evaluation row; None if it is not."""
        if same := self.exact.get(request.key):
            return f"in the evaluation set {same.source}", same.id
        near = next((self.rows[number] for number in self.index.near(request)), None)
        return (f"near the evaluation set {near.source}", near.id) if near else None


class NearIndex:
    """Index of fingerprints that finds those near another one (`Fingerprint.is_near`)."""

    def __init__(self, text: float, image: int) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise MissingExtraError("datasketch", "data") from error
        self._text, self._image = text, image
        self._rows: list[Fingerprint] = []
        self._by_image: dict[object, list[int]] = {}
        self._empty: Any = MinHash(_PERMUTATIONS, hashfunc=int)
        self._by_text: Any = MinHashLSH(num_perm=_PERMUTATIONS, params=bands(text))

    def add(self, fingerprint: Fingerprint) -> None:
        """Add a fingerprint; its number is the count of those added before."""
        number = len(self._rows)
        self._rows.append(fingerprint)
        if fingerprint.images:
            for key in self._keys(fingerprint):
                self._by_image.setdefault(key, []).append(number)
        else:
            self._by_text.insert(number, self._sketch(fingerprint), check_duplication=False)

    def near(self, fingerprint: Fingerprint) -> Iterator[int]:
        """The numbers of the near fingerprints, ascending."""
        if fingerprint.images:
            candidates = {number for key in self._keys(fingerprint) for number in self._by_image.get(key, ())}
        else:
            candidates = set(self._by_text.query(self._sketch(fingerprint)))
        for number in sorted(candidates):
            if fingerprint.is_near(self._rows[number], self._text, self._image):
                yield number

    def _keys(self, fingerprint: Fingerprint) -> Iterator[object]:
        return fingerprint.images[0][0].keys(self._image)

    def _sketch(self, fingerprint: Fingerprint) -> Any:
        sketch = self._empty.copy()
        # The complement gives a response's shingles other hashes than the same words in a prompt.
        hashes = np.concatenate((fingerprint.prompt, ~fingerprint.response))
        sketch.update_batch((hashes >> np.uint64(32)).tolist())
        return sketch


def bands(text: float) -> tuple[int, int]:
    """Bands and rows per band: the longest bands that miss at most 1% of the pairs with Jaccard index `text`.

    A band of r rows agrees with probability `text ** r`.
    """
    sizes = range(1, _PERMUTATIONS // 2 + 1)
    longest = max((rows for rows in sizes if (1 - text**rows) ** (_PERMUTATIONS // rows) <= _MAX_MISS_RATE), default=1)
    return _PERMUTATIONS // longest, longest
