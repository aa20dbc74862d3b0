"""Safety-aware data concatenation (paper, section 3.3; method, section 4): two rows become one.

Labels follow the union rule (`sources.union`). Texts are joined by a blank line, and the images of both become one
image; where only one row has images, they stay as they are.

Harmful outcomes prevail: where a share p of the rows is harmful, 1 - (1 - p)^2 of the pairs are, 75% for p = 1/2.
Drawing pairs of either outcome apart gives the same as drawing from all and leaving the prevailing ones out.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.images.geometry import LAYOUTS
from guardreasoner_vl.sources.union import class_of, union_label
from guardreasoner_vl.types import Sample

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

    from guardreasoner_vl.images.geometry import Layout
    from guardreasoner_vl.types import GoldLabel, Modality, Target

SOURCE = "augmented"
_NAMESPACE = "aug/"
_RECORDED = {"id", "modality", "request_label", "response_label"}


@dataclass(frozen=True)
class Pair:
    """Two rows in the order in which they are joined; `layout` is how their images are merged."""

    first: Sample
    second: Sample
    layout: Layout

    @property
    def name(self) -> str:
        """What the joined row is called, made of both ids."""
        ids = json.dumps([self.first.id, self.second.id])
        return hashlib.sha256(ids.encode()).hexdigest()[:24]

    @property
    def merges(self) -> bool:
        """Whether there are images on both sides."""
        return bool(self.first.images and self.second.images)


def drawn_pairs(rows: Sequence[Sample], rng: random.Random, outcome: GoldLabel | None = None) -> Iterator[Pair]:
    """Every pair of different rows once, in random order, drawn as they are asked for.

    With an `outcome`, only pairs with a harmful row, or only pairs without one. Rows are told apart by id.
    """
    known = {row.id: row for row in rows}.values()
    plain = [row for row in known if class_of(row) != "harmful"]
    ordered = [*plain, *(row for row in known if class_of(row) == "harmful")]
    # Pairs are numbered by their later row, so those without a harmful row come first.
    edge, end = math.comb(len(plain), 2), math.comb(len(ordered), 2)
    start, stop = {"harmful": (edge, end), "unharmful": (0, edge), None: (0, end)}[outcome]
    for number in _shuffled(start, stop, rng):
        later = (1 + math.isqrt(1 + 8 * number)) // 2
        pair = [ordered[later], ordered[number - math.comb(later, 2)]]
        rng.shuffle(pair)
        yield Pair(pair[0], pair[1], rng.choice(LAYOUTS))


def _shuffled(start: int, stop: int, rng: random.Random) -> Iterator[int]:
    """The numbers from `start` to before `stop` in random order; memory grows with those taken only."""
    moved: dict[int, int] = {}
    for last in range(stop - 1, start - 1, -1):
        at = rng.randint(start, last)
        yield moved.get(at, at)
        moved[at] = moved.pop(last, last)


def joint_label(pair: Pair, target: Target) -> GoldLabel | None:
    """The union rule; None where a label that would decide is unknown, and where there is nothing to judge."""
    return union_label((pair.first, pair.second), target)


def joined(pair: Pair, image: str | None = None) -> Sample:
    """The pair as one row; `image` is the path of the merged one, needed where both have images.

    Raises `ValueError` if it is missing there or given elsewhere.
    """
    if pair.merges != (image is not None):
        raise ValueError("a merged image belongs to pairs with images on both sides, and to no others")
    first, second = pair.first, pair.second
    images = (image,) if image is not None else first.images + second.images
    prompt, response = _text(first.prompt, second.prompt), _text(first.response, second.response)
    modality: Modality = "text" if not images else "text-image" if prompt or response else "image"
    meta = {"parents": [row.model_dump(include=_RECORDED) for row in (first, second)]}
    return Sample(
        id=_NAMESPACE + pair.name,
        source=SOURCE,
        modality=modality,
        prompt=prompt,
        images=images,
        response=response or None,
        request_label=joint_label(pair, "request"),
        response_label=joint_label(pair, "response"),
        meta={**meta, "layout": pair.layout} if pair.merges else meta,
    )


def _text(*texts: str | None) -> str:
    return "\n\n".join(text for text in texts if text and text.strip())
