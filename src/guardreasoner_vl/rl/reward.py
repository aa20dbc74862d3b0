"""Rewards of one answer (docs/method.md, section 5; paper, section 3.3).

    r_safety = I_format * mean of [label right] over the labels that count
    r        = (r_safety - 1) / min(l, beta)^2                               `paper`
    r        = (r_safety - 1) * (1 + lam * (1 - min(l, beta) / beta))        `bounded`; -(1 + lam) without format
    r        = r_safety                                                      `plain`

`bounded` subtracts `token_cost` * l from the reward of a fully right answer.

l is the length of the reasoning divided by the completion limit, at least `min_length`; an answer outside the grammar
has l = `min_length`.
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
    """One answer's reward and its parts; `length` is l before the cut-off at beta."""

    format: float
    accuracy: float
    safety: float
    length: float
    total: float


def reward(parsed: ParsedAnswer, sample: Sample, reasoning_tokens: int, limit: int, section: RewardSection) -> Reward:
    """The reward of an answer to `sample`; `limit` is the completion limit in tokens."""
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
    """1 exactly when the parser accepts (docs/protocol.md, section 5)."""
    return float(parsed.reason is None)


def accuracy(parsed: ParsedAnswer, sample: Sample) -> float:
    """The share of right labels among those that count, in [0, 1].

    Known labels count. For an absent prompt or response any word but `harmful` is right. The share is 0 for an answer
    outside the grammar, and if no label is known.
    """
    if parsed.written is None or not (sample.request_label or sample.response_label):
        return 0.0
    request, response = parsed.written
    right = []
    for is_present, gold, label in (
        (sample.has_request, sample.request_label, request),
        (sample.has_response, sample.response_label, response),
    ):
        if not is_present:
            right.append(label is not Label.HARMFUL)
        elif gold is not None:
            right.append(label == gold)
    return sum(right) / len(right)


def normalised_length(reasoning_tokens: int, limit: int, min_length: float) -> float:
    """The normalised length l, in [min_length, 1]."""
    return min(1.0, max(min_length, reasoning_tokens / limit))


def paper_form(safety: float, length: float, beta: float) -> float:
    """The paper's formula as printed, in [-1 / min_length^2, 0]."""
    return (safety - 1) / min(length, beta) ** 2


def bounded_form(safety: float, formed: float, length: float, section: RewardSection) -> float:
    """A longer answer lowers the penalty of being wrong, but a wrong answer never outranks a right one."""
    if not formed:
        return -(1 + section.lam)
    penalty = (safety - 1) * (1 + section.lam * (1 - min(length, section.beta) / section.beta))
    return penalty - section.token_cost * length * (safety == 1)
