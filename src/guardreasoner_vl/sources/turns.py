"""Rows taken in turn: each once before any is taken again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Iterator

    from guardreasoner_vl.types import GoldLabel, Sample

CLASSES: tuple[GoldLabel, ...] = ("harmful", "unharmful")


@dataclass(frozen=True)
class Turns:
    """Rows by class, each class in an order of its own."""

    cycles: dict[GoldLabel, Iterator[Sample]]

    @classmethod
    def of(cls, rows: Iterable[Sample], class_of: Callable[[Sample], GoldLabel | None], rng: random.Random) -> Turns:
        """The rows by `class_of`, repeats once, in a random order; rows without a class are left out."""
        groups: dict[GoldLabel, list[Sample]] = {label: [] for label in CLASSES}
        for row in {row.id: row for row in rows}.values():
            if label := class_of(row):
                groups[label].append(row)
        for group in groups.values():
            rng.shuffle(group)
        return cls({label: cycle(group) for label, group in groups.items()})

    def take(self, label: GoldLabel) -> Sample | None:
        """The next row of the class; None if it has none."""
        return next(self.cycles[label], None)
