"""Rejection sampling (paper, section 3.3; docs/method.md, section 4): k answers decide whether a row is kept.

right_i = I_format,i * accuracy_i = 1        an answer outside the grammar is wrong
kept    = no right_i                         `all_wrong`, the paper's rule
        = some right_i and some not          `mixed`: only such rows have advantages other than 0
        = those of them with more than k / 2 right_i   `mostly_right`: the guard's majority confirms the label
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from guardreasoner_vl.mining.rollout_io import derive_seed, exchange_request, parse_rollout
from guardreasoner_vl.rl.reward import accuracy, format_reward
from guardreasoner_vl.storage.jsonl_log import Format, read_log_rows
from guardreasoner_vl.types import Frozen, Modality

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from guardreasoner_vl.engines.base import EngineRequest, EngineResult
    from guardreasoner_vl.recipe import KeepRule, MineSection
    from guardreasoner_vl.types import Exchange, Sample


class Candidates(Frozen):
    """The grades of a row's answers, without their texts; each tuple has one entry for each answer.

    `safety` is I_format * accuracy, `tokens` the completion tokens, `reasons` why the answer is outside the grammar.
    """

    id: str
    source: str
    modality: Modality
    right: tuple[bool, ...]
    safety: tuple[float, ...]
    tokens: tuple[int, ...]
    reasons: tuple[str | None, ...]


def read_candidates(path: Path) -> Iterator[Candidates]:
    """Stream the judged rows of one file; raises `DataError` that names a line that is invalid or repeats a row."""
    return read_log_rows(path, FORMAT)


FORMAT = Format(Candidates.model_validate_json, "a row's candidates", key=lambda row: row.id)
"""The line format of a file of candidates."""


def candidate_requests(sample: Sample, exchange: Exchange, section: MineSection, seed: int) -> list[EngineRequest]:
    """The k requests about the row's exchange: `slow` mode's prompt, sampled, each with its own seed.

    Raises `InputError`.
    """
    request = replace(
        exchange_request(exchange),
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
    )
    return [replace(request, seed=candidate_seed(seed, sample.id, number)) for number in range(section.candidates)]


def candidate_seed(seed: int, row: str, number: int) -> int:
    """The seed of a row's answer; it depends on the three arguments alone."""
    return derive_seed(f"{seed}-{number}-{row}")


def graded(sample: Sample, answers: Sequence[EngineResult]) -> Candidates:
    """Grade the answers by the row's labels; `answers` must not contain engine faults."""
    parsed_answers = [parse_rollout(sample, answer) for answer in answers]
    safety = tuple(format_reward(parsed) * accuracy(parsed, sample) for parsed in parsed_answers)
    return Candidates(
        id=sample.id,
        source=sample.source,
        modality=sample.modality,
        right=tuple(value == 1 for value in safety),
        safety=safety,
        tokens=tuple(answer.usage.completion_tokens for answer in answers),
        reasons=tuple(parsed.reason for parsed in parsed_answers),
    )


def is_kept(right: Sequence[bool], rule: KeepRule) -> bool:
    """Whether a row with these answers belongs to the RL set."""
    match rule:
        case "all_wrong":
            return not any(right)
        case "mixed":
            return any(right) and not all(right)
        case "mostly_right":
            return sum(right) > len(right) / 2 and not all(right)


@dataclass
class PassRates:
    """The distribution of rows over the number of right answers, by source, and totals over the answers."""

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
        """The share of answers inside the grammar; None without answers."""
        return self.formed / self.answers if self.answers else None

    @property
    def tokens_mean(self) -> float | None:
        """Mean completion tokens of an answer; None without answers."""
        return self.tokens / self.answers if self.answers else None

    def of(self, source: str, candidates: int) -> tuple[int, ...]:
        """The number of the source's rows with 0, 1, ... `candidates` right answers."""
        return tuple(self.sources[source][number] for number in range(candidates + 1))

    def of_all(self, candidates: int) -> tuple[int, ...]:
        """The number of rows of all sources with 0, 1, ... `candidates` right answers."""
        return tuple(sum(counts[number] for counts in self.sources.values()) for number in range(candidates + 1))
