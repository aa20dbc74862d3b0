"""Rejection sampling (paper, section 3.3; method, section 4): k answers to one row, and whether the row is kept.

right_i = I_format,i * accuracy_i = 1        an answer outside the grammar is wrong
kept    = no right_i                         `all_wrong`, the paper's rule
        = some right_i and some not          `mixed`: only there do advantages differ from 0
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from guardreasoner_vl.mining.rollout_io import asked, parsed, seed_of
from guardreasoner_vl.rl.reward import accuracy, format_reward
from guardreasoner_vl.storage.jsonl_log import Format, read_rows
from guardreasoner_vl.types import Frozen, Modality

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from guardreasoner_vl.engines.base import EngineRequest, EngineResult
    from guardreasoner_vl.recipe import KeepRule, MineSection
    from guardreasoner_vl.types import Sample


class Candidates(Frozen):
    """What a row's answers were worth, each tuple with one entry for each answer; no texts.

    `safety` is I_format * accuracy, `tokens` what the answer took, `reasons` why it is outside the grammar.
    """

    id: str
    source: str
    modality: Modality
    right: tuple[bool, ...]
    safety: tuple[float, ...]
    tokens: tuple[int, ...]
    reasons: tuple[str | None, ...]


def read_candidates(path: Path) -> Iterator[Candidates]:
    """Stream the judged rows of one file; raises `DataError` with the line that is none or repeats a row."""
    return read_rows(path, FORMAT)


FORMAT = Format(Candidates.model_validate_json, "a row's candidates", key=lambda row: row.id)
"""The lines of a file of candidates."""


def candidate_requests(sample: Sample, section: MineSection, seed: int) -> list[EngineRequest]:
    """The row's k questions: those of `slow` mode, sampled, each with its own seed. Raises `InputError`."""
    request = replace(
        asked(sample), max_new_tokens=section.max_new_tokens, temperature=section.temperature, top_p=section.top_p
    )
    return [replace(request, seed=candidate_seed(seed, sample.id, number)) for number in range(section.candidates)]


def candidate_seed(seed: int, row: str, number: int) -> int:
    """The seed of a row's answer; it depends on these three alone."""
    return seed_of(f"{seed}-{number}-{row}")


def judged(sample: Sample, answers: Sequence[EngineResult]) -> Candidates:
    """Compare the answers with the row's labels; a fault is no answer and must not be among them."""
    found = [parsed(sample, answer) for answer in answers]
    safety = tuple(format_reward(one) * accuracy(one, sample) for one in found)
    return Candidates(
        id=sample.id,
        source=sample.source,
        modality=sample.modality,
        right=tuple(value == 1 for value in safety),
        safety=safety,
        tokens=tuple(answer.usage.completion_tokens for answer in answers),
        reasons=tuple(one.reason for one in found),
    )


def is_kept(right: Sequence[bool], rule: KeepRule) -> bool:
    """Whether a row with these answers belongs to the RL set."""
    match rule:
        case "all_wrong":
            return not any(right)
        case "mixed":
            return any(right) and not all(right)


@dataclass
class PassRates:
    """How many rows have how many right answers, by source, and what the answers were like."""

    sources: dict[str, Counter[int]] = field(default_factory=dict)
    answers: int = 0
    formed: int = 0
    tokens: int = 0

    def add(self, row: Candidates) -> None:
        """Count one more row."""
        self.sources.setdefault(row.source, Counter())[sum(row.right)] += 1
        self.answers += len(row.right)
        self.formed += row.reasons.count(None)
        self.tokens += sum(row.tokens)

    @property
    def coverage(self) -> float | None:
        """The share of answers inside the grammar."""
        return self.formed / self.answers if self.answers else None

    @property
    def tokens_mean(self) -> float | None:
        """Completion tokens of an answer."""
        return self.tokens / self.answers if self.answers else None

    def of(self, source: str, candidates: int) -> tuple[int, ...]:
        """The source's rows with 0, 1, ... `candidates` right answers."""
        return tuple(self.sources[source][number] for number in range(candidates + 1))

    def of_all(self, candidates: int) -> tuple[int, ...]:
        """All rows with 0, 1, ... `candidates` right answers."""
        return tuple(sum(counts[number] for counts in self.sources.values()) for number in range(candidates + 1))
