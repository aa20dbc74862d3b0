"""Statistics of a corpus: the paper's Table 6, labels, categories and lengths."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.corpus.progress import TRAIN
from guardreasoner_vl.teachers.gates import steps_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from guardreasoner_vl.types import Sample

PARTS = ("prompt", "response", "reasoning")
ALL = "all"


@dataclass
class StepCounts:
    """One line of Table 6: training rows, those with reasoning, their steps, and the steps' characters."""

    rows: int = 0
    reasoned: int = 0
    steps: int = 0
    characters: int = 0

    def add(self, sample: Sample) -> None:
        """Count one row."""
        self.rows += 1
        if sample.reasoning and (steps := steps_of(sample.reasoning)):
            self.reasoned += 1
            self.steps += len(steps)
            self.characters += sum(map(len, steps))

    @property
    def mean_steps(self) -> float | None:
        """Mean steps per row with reasoning; None without such a row."""
        return self.steps / self.reasoned if self.reasoned else None

    @property
    def mean_characters(self) -> float | None:
        """Mean characters per step; None without steps."""
        return self.characters / self.steps if self.steps else None


@dataclass
class Stats:
    """Counts over a corpus; `lengths` has the characters of each non-empty prompt, response and reasoning."""

    modalities: dict[str, StepCounts] = field(default_factory=lambda: {ALL: StepCounts()})
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    splits: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def as_json(self) -> dict[str, Any]:
        """Plain data; lengths are given as quantiles."""
        return {
            "modalities": {
                name: {**vars(steps), "mean_steps": steps.mean_steps, "mean_characters": steps.mean_characters}
                for name, steps in self.modalities.items()
            },
            "labels": {name: dict(counts) for name, counts in self.labels.items()},
            "sources": {name: dict(counts) for name, counts in self.sources.items()},
            "splits": dict(self.splits),
            "categories": dict(self.categories.most_common()),
            "characters": {part: quantiles(values) for part, values in self.lengths.items() if values},
        }


def stats_of(samples: Iterable[Sample]) -> Stats:
    """Count the rows of a stream."""
    stats = Stats()
    for sample in samples:
        for name in (sample.modality, ALL) if sample.split == TRAIN else ():
            stats.modalities.setdefault(name, StepCounts()).add(sample)
        for target, label in (("request", sample.request_label), ("response", sample.response_label)):
            if target == "request" or sample.response:
                stats.labels.setdefault(f"{target}, {sample.modality}", Counter())[label or "not labelled"] += 1
        label = "harmful" if "harmful" in (sample.request_label, sample.response_label) else "unharmful"
        known = sample.request_label or sample.response_label
        stats.sources.setdefault(sample.source, Counter())[label if known else "not labelled"] += 1
        stats.splits[sample.split] += 1
        stats.categories[sample.provenance.taxonomy or "not categorised"] += 1
        for part in PARTS:
            if text := getattr(sample, part):
                stats.lengths[part].append(len(text))
    stats.modalities[ALL] = stats.modalities.pop(ALL)  # last, as in the paper's table
    return stats


def quantiles(values: list[int]) -> dict[str, int]:
    """Minimum, median, 95th percentile and maximum."""
    ordered = sorted(values)
    shares = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in shares.items()}
