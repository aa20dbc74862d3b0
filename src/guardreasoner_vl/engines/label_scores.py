"""Log-probabilities of label words, computed from the likeliest tokens where the label starts.

Each of these tokens counts for the candidate that it is a prefix of, if there is only one: with the candidates
` harmful` and ` unharmful`, ` un` and ` unh` count for the second, and a single space for neither. A candidate's
probability is the sum of its tokens' probabilities at the first token that distinguishes the candidates.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.protocol import END_OF_RESULT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

START_OF_RESULT = "<result>"
_ROUNDING = 1e-6  # the log-probabilities are float32, so their sum is not exact


@dataclass(frozen=True)
class Token:
    """One generated token, and the likeliest tokens at its position with their log-probabilities."""

    text: str
    top: tuple[tuple[str, float], ...]


def label_offset(text: str, field: str) -> int | None:
    """The index of the label: after the last `field` inside the last result block; None if there is none."""
    start = text.rfind(START_OF_RESULT)
    if start < 0:
        return None
    end = text.find(END_OF_RESULT, start)
    field_start = text.rfind(field, start, len(text) if end < 0 else end)
    return None if field_start < 0 else field_start + len(field)


def likeliest(logprobs: Sequence[float]) -> int:
    """Index of the largest log-probability; the first one if several are equal."""
    return max(range(len(logprobs)), key=logprobs.__getitem__)


def compare_candidates(options: Sequence[tuple[str, float]], candidates: Sequence[str]) -> tuple[float, ...] | None:
    """One log-probability per candidate, from the likeliest tokens (text, log-probability) where the label starts.

    A candidate without a token gets an upper bound: the probability that the listed tokens do not cover, at most that
    of the least likely of them. None if no token is a prefix of exactly one candidate.
    """
    shares: list[list[float]] = [[] for _ in candidates]
    for text, logprob in options:
        matches = _starting_with(text, candidates)
        if text and len(matches) == 1:
            shares[matches[0]].append(logprob)
    if not any(shares):
        return None
    uncovered = max(1.0 - sum(math.exp(logprob) for _, logprob in options), _ROUNDING)
    bound = min(math.log(uncovered), *(logprob for _, logprob in options))
    return tuple(_log_sum(share) if share else min(0.0, bound) for share in shares)


def read_labels(
    prefix: str, generated: str, tokens: Sequence[Token], fields: Sequence[str], candidates: Sequence[str]
) -> Mapping[str, tuple[float, ...]]:
    """The candidates' log-probabilities for each field of `prefix + generated` whose label was generated.

    The texts of `tokens` form `generated`, perhaps followed by an end-of-turn token. A field is missing if they do not,
    or if none of the likeliest tokens is a prefix of a candidate.
    """
    text, token_text = prefix + generated, prefix + "".join(token.text for token in tokens)
    labels: dict[str, tuple[float, ...]] = {}
    for field in fields:
        start, text_start = label_offset(token_text, field), label_offset(text, field)
        if start is None or text_start is None or start < len(prefix):
            continue
        if not token_text[start:].startswith(text[text_start:].rstrip()):
            continue
        logprobs = _at_label(start - len(prefix), tokens, candidates)
        if logprobs:
            labels[field] = logprobs
    return labels


def _at_label(start: int, tokens: Sequence[Token], candidates: Sequence[str]) -> tuple[float, ...] | None:
    """Compare at the first token that distinguishes the candidates, for a label at character `start`."""
    label, end = "", 0
    for token in tokens:
        token_start, end = end, end + len(token.text)
        if end <= start:
            continue
        head = token.text[: max(0, start - token_start)]
        longer_label = label + token.text.removeprefix(head)
        if len(_starting_with(longer_label, candidates)) <= 1:
            options = [(label + text[len(head) :], logprob) for text, logprob in token.top if text.startswith(head)]
            return compare_candidates(options, candidates) if options else None
        label = longer_label
    return None


def _starting_with(text: str, candidates: Sequence[str]) -> list[int]:
    """The indices of the candidates that start with `text`."""
    return [index for index, candidate in enumerate(candidates) if candidate.startswith(text)]


def _log_sum(logprobs: Sequence[float]) -> float:
    mass = sum(math.exp(logprob) for logprob in logprobs)
    return min(0.0, math.log(max(mass, sys.float_info.min)))
