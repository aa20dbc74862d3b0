"""Rewards of one answer (method, section 5; paper, section 3.3).

    r_safety = I_format * mean of [label right] over the labels that count
    r        = (r_safety - 1) / min(l, beta)^2                               `paper`
    r        = (r_safety - 1) * (1 + lam * (1 - min(l, beta) / beta))        `bounded`, ours; -(1 + lam) without format
    r        = r_safety                                                      `plain`

`bounded` may take `token_cost` * l off a wholly right answer.

l is the length of the reasoning over the completion limit, at least `min_length`; an answer outside the grammar
counts as shortest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.types import Label

if TYPE_CHECKING:
    from guardreasoner_vl.protocol import ParsedAnswer
    from guardreasoner_vl.recipe import RewardSection
    from guardreasoner_vl.types import Sample


@dataclass(frozen=True)
class Reward:
    """One answer's reward and its parts; `length` is l before the cut-off."""

    format: float
    accuracy: float
    safety: float
    length: float
    total: float


def reward(parsed: ParsedAnswer, sample: Sample, reasoning_tokens: int, limit: int, section: RewardSection) -> Reward:
    """The reward of an answer to `sample`; `limit` is the most tokens that a completion may have."""
    formed, right = format_reward(parsed), accuracy(parsed, sample)
    safety = formed * right
    length = normalised_length(reasoning_tokens if formed else 0, limit, section.min_length)
    match section.form:
        case "paper":
            total = paper_form(safety, length, section.beta)
        case "bounded":
            total = bounded_form(safety, formed, length, section)
        case "plain":
            total = safety
    return Reward(formed, right, safety, length, total)


def format_reward(parsed: ParsedAnswer) -> float:
    """1 exactly when the parser accepts (protocol, section 5)."""
    return float(parsed.reason is None)


def accuracy(parsed: ParsedAnswer, sample: Sample) -> float:
    """Share of right labels among those that count, in [0, 1].

    A known label counts. Where there is nothing to judge any word but `harmful` is right. 0 outside the grammar, and
    where no label is known.
    """
    if parsed.written is None or not (sample.request_label or sample.response_label):
        return 0.0
    request, response = parsed.written
    exchange = sample.exchange()
    right = []
    for there, gold, said in (
        (exchange.has_prompt, sample.request_label, request),
        (exchange.has_response, sample.response_label, response),
    ):
        if not there:
            right.append(said is not Label.HARMFUL)
        elif gold is not None:
            right.append(said == gold)
    return sum(right) / len(right)


def normalised_length(reasoning_tokens: int, limit: int, min_length: float) -> float:
    """l, in [min_length, 1]."""
    return min(1.0, max(min_length, reasoning_tokens / limit))


def paper_form(safety: float, length: float, beta: float) -> float:
    """The formula as printed; 0 at most, -1 / min_length^2 at least."""
    return (safety - 1) / min(length, beta) ** 2


def bounded_form(safety: float, formed: float, length: float, section: RewardSection) -> float:
    """Length softens a wrong answer's penalty but never outranks being right."""
    if not formed:
        return -(1 + section.lam)
    penalty = (safety - 1) * (1 + section.lam * (1 - min(length, section.beta) / section.beta))
    return penalty - section.token_cost * length * (safety == 1)
