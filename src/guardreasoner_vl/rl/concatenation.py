"""Safety-aware data concatenation (paper, section 3.3; docs/method.md, section 4): join two rows into one.

Labels follow the union rule (`sources.union`). Texts are joined by a blank line. If both rows have images, they are
merged into one; if only one row has images, they are kept unchanged.

Harmful pairs prevail: if a share p of the rows is harmful, 1 - (1 - p)^2 of the pairs are, 75% for p = 1/2. Drawing
pairs for each outcome separately is equivalent to drawing from all pairs and dropping the excess of the prevailing one.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.images.geometry import LAYOUTS
from guardreasoner_vl.sources.union import class_of, union_label
from guardreasoner_vl.types import Parent, Provenance, Sample

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

    from guardreasoner_vl.images.geometry import Layout
    from guardreasoner_vl.types import GoldLabel, Modality, Target

SOURCE = "augmented"
_NAMESPACE = "aug/"


@dataclass(frozen=True)
class Pair:
    """Two rows in the order in which they are joined; `layout` says how their images are merged."""

    first: Sample
    second: Sample
    layout: Layout

    @property
    def name(self) -> str:
        """The joined row's name, a digest of both ids."""
        ids = json.dumps([self.first.id, self.second.id])
        return hashlib.sha256(ids.encode()).hexdigest()[:24]

    @property
    def merges(self) -> bool:
        """Whether both rows have images, which must be merged."""
        return bool(self.first.images and self.second.images)


def drawn_pairs(rows: Sequence[Sample], rng: random.Random, outcome: GoldLabel | None = None) -> Iterator[Pair]:
    """Every pair of different rows once, in random order, drawn lazily.

    `outcome` limits them to pairs with a harmful row, or to pairs without one. Rows with the same id are one row.
    """
    known = {row.id: row for row in rows}.values()
    plain = [row for row in known if class_of(row) != "harmful"]
    ordered = [*plain, *(row for row in known if class_of(row) == "harmful")]
    # Pairs are numbered by their later row, so that pairs without a harmful row have the lower numbers.
    edge, end = math.comb(len(plain), 2), math.comb(len(ordered), 2)
    start, stop = {"harmful": (edge, end), "unharmful": (0, edge), None: (0, end)}[outcome]
    for number in _shuffled(start, stop, rng):
        later = (1 + math.isqrt(1 + 8 * number)) // 2
        pair = [ordered[later], ordered[number - math.comb(later, 2)]]
        rng.shuffle(pair)
        yield Pair(pair[0], pair[1], rng.choice(LAYOUTS))


def _shuffled(start: int, stop: int, rng: random.Random) -> Iterator[int]:
    """The numbers of range(start, stop) in random order; memory grows with the numbers taken so far."""
    moved: dict[int, int] = {}
    for last in range(stop - 1, start - 1, -1):
        at = rng.randint(start, last)
        yield moved.get(at, at)
        moved[at] = moved.pop(last, last)


def joint_label(pair: Pair, target: Target) -> GoldLabel | None:
    """The pair's label by the union rule; None if it is undetermined, or if there is nothing to judge."""
    return union_label((pair.first, pair.second), target)


def concatenated(pair: Pair, image: str | None = None) -> Sample:
    """Join the pair into one row; `image` is the path of the merged image.

    Raises `ValueError` unless `image` is given exactly if both rows have images.
    """
    if pair.merges != (image is not None):
        raise ValueError("give a merged image if both rows of the pair have images, and only then")
    first, second = pair.first, pair.second
    images = (image,) if image is not None else first.images + second.images
    prompt, response = _joined_text(first.prompt, second.prompt), _joined_text(first.response, second.response)
    modality: Modality = "text" if not images else "text-image" if prompt or response else "image"
    known = Provenance(parents=(_parent(first), _parent(second)), layout=pair.layout if pair.merges else None)
    return Sample(
        id=_NAMESPACE + pair.name,
        source=SOURCE,
        modality=modality,
        prompt=prompt,
        images=images,
        response=response or None,
        request_label=joint_label(pair, "request"),
        response_label=joint_label(pair, "response"),
        meta=known.as_meta(),
    )


def _parent(row: Sample) -> Parent:
    return Parent(id=row.id, modality=row.modality, request_label=row.request_label, response_label=row.response_label)


def _joined_text(*texts: str | None) -> str:
    return "\n\n".join(text for text in texts if text and text.strip())
