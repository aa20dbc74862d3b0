"""Duplicates, contradictions and rows of the evaluation sets: what a corpus must not hold.

    every image decoded -> rows of the evaluation sets -> exact duplicates -> near duplicates

What is compared is a sample's whole content (`fingerprints`), and the first of several duplicates stays. Exact ones
whose labels contradict each other are all set aside; near ones both stay, since they may be a contrast pair. Near
texts are found by MinHash in bands (Leskovec, Rajaraman and Ullman, *Mining of Massive Datasets*, chapter 3), near
images by the parts of their hashes; the Jaccard index and the distance themselves then decide.
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
Progress: TypeAlias = "Callable[[int, int | None], None]"
_LABELS = ("request_label", "response_label")
_PERMUTATIONS = 64
_MISSED = 0.01  # of the pairs right at the threshold, that no band may find
_STEP = 256  # rows between two reports of progress


@dataclass(frozen=True)
class Dropped:
    """A row that was left out; `other` is the row that it was compared with, of the corpus or an evaluation set."""

    id: str
    reason: str
    other: str | None = None


@dataclass(frozen=True)
class Deduplicated:
    """What stays and what was dropped, each in the order given.

    `labels_merged` counts labels that kept rows took from their exact duplicates; `unread` names evaluation rows
    whose image cannot be decoded, so that nothing was compared with them.
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
        """Plain data; of the kept rows their number."""
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
    progress: Progress | None = None,
) -> Deduplicated:
    """Drop duplicates, contradictions, and rows whose request is that of a row of the evaluation sets `against`.

    Near: texts whose Jaccard index is `text` or more, images within `image` of 64 bits. `progress` gets the rows
    read, evaluation rows first, and how many there are in all (None for a stream). Raises `InputError`,
    `MissingExtraError`.
    """
    if not (0 < text <= 1 and 0 <= image < HASH_BITS):
        raise InputError(f"nothing compares by text {text} and image {image}: give 0 < text <= 1, 0 <= image <= 63")
    evaluation = list(against)
    total = len(evaluation) + len(samples) if isinstance(samples, Sized) else None
    stream = _told(fingerprints(chain(evaluation, samples)), total, progress)
    kept_out = KeptOut(NearIndex(text, image))
    for sample, found in islice(stream, len(evaluation)):
        kept_out.add(sample, found)

    rows: list[Sample] = []
    prints: dict[int, Fingerprint] = {}
    dropped: dict[int, Dropped] = {}
    for number, (sample, found) in enumerate(stream):
        rows.append(sample)
        if found is None:
            dropped[number] = Dropped(sample.id, UNREADABLE)
        elif reason := kept_out.reason(found.request()):
            dropped[number] = Dropped(sample.id, *reason)
        else:
            prints[number] = found

    once = _without_exact(rows, prints, dropped)
    kept = _without_near(once, prints, NearIndex(text, image), dropped)
    gained = sum(getattr(row, name) != getattr(rows[number], name) for number, row in kept.items() for name in _LABELS)
    return Deduplicated(list(kept.values()), [dropped[number] for number in sorted(dropped)], gained, kept_out.unread)


def _told(rows: Iterator[Fingerprinted], total: int | None, progress: Progress | None) -> Iterator[Fingerprinted]:
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
    """The first row of each content by its number, with the labels that any of its duplicates has."""
    groups: dict[bytes, list[int]] = {}
    for number, found in prints.items():
        groups.setdefault(found.key, []).append(number)
    once = {}
    for first, *others in groups.values():
        group = [rows[number] for number in (first, *others)]
        labels = {name: {label for row in group if (label := getattr(row, name))} for name in _LABELS}
        if any(len(found) > 1 for found in labels.values()):
            for number in (first, *others):
                # A row that lacks the label in question contradicts none: another of the group stands for all.
                stand_in = group[1] if number == first else group[0]
                other = next((row for row in group if contradict(row, rows[number])), stand_in)
                dropped[number] = Dropped(rows[number].id, CONTRADICTORY, other.id)
            continue
        merged = {name: next(iter(found), None) for name, found in labels.items()}
        once[first] = rows[first].model_copy(update=merged) if others else rows[first]
        dropped.update((number, Dropped(rows[number].id, EXACT, rows[first].id)) for number in others)
    return once


def _without_near(
    once: dict[int, Sample], prints: dict[int, Fingerprint], index: NearIndex, dropped: dict[int, Dropped]
) -> dict[int, Sample]:
    """The rows that are near no earlier one that stays, or only such that they contradict."""
    kept: dict[int, Sample] = {}
    numbers: list[int] = []
    for number, row in once.items():
        near = (kept[numbers[place]] for place in index.near(prints[number]))
        other = next((earlier for earlier in near if not contradict(earlier, row)), None)
        if other:
            dropped[number] = Dropped(row.id, NEAR, other.id)
        else:
            kept[number] = row
            numbers.append(number)
            index.add(prints[number])
    return kept


def contradict(one: Sample, other: Sample) -> bool:
    """Whether the two say different things about the request or about the response."""
    pairs = ((getattr(one, name), getattr(other, name)) for name in _LABELS)
    return any(mine and theirs and mine != theirs for mine, theirs in pairs)


@dataclass
class KeptOut:
    """The requests of the evaluation sets; `unread` names the rows of which nothing is known."""

    index: NearIndex
    rows: list[Sample] = field(default_factory=list)
    exact: dict[bytes, Sample] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def add(self, sample: Sample, found: Fingerprint | None) -> None:
        """Keep this evaluation row's request out of the corpus."""
        if found is None:
            self.unread.append(sample.id)
            return
        request = found.request()
        if request.key not in self.exact:
            self.exact[request.key] = sample
            self.rows.append(sample)
            self.index.add(request)

    def reason(self, request: Fingerprint) -> tuple[str, str] | None:
        """Why a row of this request is dropped, and because of which evaluation row."""
        if same := self.exact.get(request.key):
            return f"in the evaluation set {same.source}", same.id
        near = next((self.rows[number] for number in self.index.near(request)), None)
        return (f"near the evaluation set {near.source}", near.id) if near else None


class NearIndex:
    """Finds which of the fingerprints added are near another one (`Fingerprint.is_near`)."""

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
        """Its number is how many were added before."""
        number = len(self._rows)
        self._rows.append(fingerprint)
        if fingerprint.images:
            for key in self._keys(fingerprint):
                self._by_image.setdefault(key, []).append(number)
        else:
            self._by_text.insert(number, self._sketch(fingerprint), check_duplication=False)

    def near(self, fingerprint: Fingerprint) -> Iterator[int]:
        """The numbers of those that are near, in their order."""
        if fingerprint.images:
            found = {number for key in self._keys(fingerprint) for number in self._by_image.get(key, ())}
        else:
            found = set(self._by_text.query(self._sketch(fingerprint)))
        for number in sorted(found):
            if fingerprint.is_near(self._rows[number], self._text, self._image):
                yield number

    def _keys(self, fingerprint: Fingerprint) -> Iterator[object]:
        return fingerprint.images[0][0].keys(self._image)

    def _sketch(self, fingerprint: Fingerprint) -> Any:
        sketch = self._empty.copy()
        # The complement keeps a response's shingles apart from the same words in a prompt.
        hashes = np.concatenate((fingerprint.prompt, ~fingerprint.response))
        sketch.update_batch((hashes >> np.uint64(32)).tolist())
        return sketch


def bands(text: float) -> tuple[int, int]:
    """How many bands of how many rows: the longest that miss at most 1% of the pairs whose Jaccard index is `text`.

    A band of r rows agrees with probability `text ** r`.
    """
    sizes = range(1, _PERMUTATIONS // 2 + 1)
    longest = max((rows for rows in sizes if (1 - text**rows) ** (_PERMUTATIONS // rows) <= _MISSED), default=1)
    return _PERMUTATIONS // longest, longest
