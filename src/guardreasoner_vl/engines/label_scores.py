"""Log-probabilities of label words, read off an answer's tokens.

Where a label begins, each token that is likely there is given to the one candidate it can begin: with the
candidates ` harmful` and ` unharmful`, ` un` and ` unh` count for the second, and a lone space for neither.
A candidate's probability is the sum of its tokens' at the first token that tells the candidates apart.
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
_ROUNDING = 1e-6  # probabilities come as float32 log-probabilities: their sum is not exact


@dataclass(frozen=True)
class Token:
    """One generated token and the likeliest tokens in its place, with their log-probabilities."""

    text: str
    top: tuple[tuple[str, float], ...]


def label_offset(text: str, field: str) -> int | None:
    """Where the label begins: after the last `field` inside the last result block; None if there is none."""
    start = text.rfind(START_OF_RESULT)
    if start < 0:
        return None
    end = text.find(END_OF_RESULT, start)
    found = text.rfind(field, start, len(text) if end < 0 else end)
    return None if found < 0 else found + len(field)


def likeliest(logprobs: Sequence[float]) -> int:
    """Index of the largest log-probability, the first of equals."""
    return max(range(len(logprobs)), key=logprobs.__getitem__)


def compare(options: Sequence[tuple[str, float]], candidates: Sequence[str]) -> tuple[float, ...] | None:
    """One log-probability per candidate from the likeliest tokens (text, log-probability) where a label begins.

    A candidate that none of them begins gets an upper bound: what probability the listed tokens leave
    over, and no more than the least likely of them has. None when no token begins any candidate.
    """
    shares: list[list[float]] = [[] for _ in candidates]
    for text, logprob in options:
        begun = _begun(text, candidates)
        if text and len(begun) == 1:
            shares[begun[0]].append(logprob)
    if not any(shares):
        return None
    left = max(1.0 - sum(math.exp(logprob) for _, logprob in options), _ROUNDING)
    floor = min(math.log(left), *(logprob for _, logprob in options))
    return tuple(_log_sum(share) if share else min(0.0, floor) for share in shares)


def read_labels(
    prefix: str, generated: str, tokens: Sequence[Token], fields: Sequence[str], candidates: Sequence[str]
) -> Mapping[str, tuple[float, ...]]:
    """Each field's candidates compared, for the fields of `prefix + generated` whose label was generated.

    `tokens` spell `generated` and may go on with an end-of-turn token. A field is left out where they
    do not, or where the model had no candidate in mind.
    """
    text, spelt = prefix + generated, prefix + "".join(token.text for token in tokens)
    found: dict[str, tuple[float, ...]] = {}
    for field in fields:
        start, written = label_offset(spelt, field), label_offset(text, field)
        if start is None or written is None or start < len(prefix):
            continue
        if not spelt[start:].startswith(text[written:].rstrip()):
            continue
        logprobs = _at_label(start - len(prefix), tokens, candidates)
        if logprobs:
            found[field] = logprobs
    return found


def _at_label(start: int, tokens: Sequence[Token], candidates: Sequence[str]) -> tuple[float, ...] | None:
    """Compare at the first token that tells candidates apart, for a label that begins `start` characters in."""
    written, end = "", 0
    for token in tokens:
        begin, end = end, end + len(token.text)
        if end <= start:
            continue
        head = token.text[: max(0, start - begin)]
        chosen = written + token.text.removeprefix(head)
        if len(_begun(chosen, candidates)) <= 1:
            options = [(written + text[len(head) :], logprob) for text, logprob in token.top if text.startswith(head)]
            return compare(options, candidates) if options else None
        written = chosen
    return None


def _begun(text: str, candidates: Sequence[str]) -> list[int]:
    """The candidates that begin with `text`."""
    return [index for index, candidate in enumerate(candidates) if candidate.startswith(text)]


def _log_sum(logprobs: Sequence[float]) -> float:
    mass = sum(math.exp(logprob) for logprob in logprobs)
    return min(0.0, math.log(max(mass, sys.float_info.min)))
