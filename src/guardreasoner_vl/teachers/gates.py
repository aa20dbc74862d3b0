"""Quality gates: which answers of a teacher are kept (docs/method.md, section 2). Pure functions of one answer.

An answer passes if it parses by the strict protocol, its labels equal every known truth, its reasoning has 1 to
10 steps, and it neither refuses, nor loops, nor is too long. Everything else is rejected with one short reason.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from operator import eq
from typing import TYPE_CHECKING

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.engines.openai import mending
from guardreasoner_vl.protocol import neutralise, parse_verdict
from guardreasoner_vl.teachers.base import known, present
from guardreasoner_vl.teachers.forms import is_refusal
from guardreasoner_vl.types import Label

if TYPE_CHECKING:
    from guardreasoner_vl.types import GoldLabel, Sample, Target

MOST_STEPS = 10
MOST_CHARACTERS = 6000
LOOP_TIMES, LOOP_WORDS, LOOP_PHRASE, STUTTER = 4, 12, 20, 120
"""Repetition limits. A phrase of at most `LOOP_PHRASE` words is a loop if it is repeated `LOOP_TIMES` in a row and the
repeats have at least `LOOP_WORDS` words; a unit of 1 to 8 letters is a loop if it is repeated `STUTTER` times.

The limits allow the longest quote of the rules teacher (8 words or 56 characters) to repeat one word or letter.
"""

EMPTY, TOO_LONG, REFUSAL, LOOP, BROKEN = "empty", "too long", "refusal", "loop", "a broken character"
NO_STEPS, TOO_MANY_STEPS, CONTRADICTION = "no steps", f"more than {MOST_STEPS} steps", "contradicts the truth"
UNPARSABLE = "unparsable: "

GOLD: dict[Label, GoldLabel] = {Label.HARMFUL: "harmful", Label.UNHARMFUL: "unharmful"}

_HEADING = re.compile(
    r"^[ \t]*(?:[#*]+[ \t]*(?:reasoning[ \t]+)?step[ \t]+\d+\b|reasoning[ \t]+step[ \t]+\d+\b|step[ \t]+\d+[ \t]*:)"
    r"[ \t*:.)\-]*",
    re.IGNORECASE | re.MULTILINE,
)
_TASK = re.compile(r"^[ \t]*[#*]+[ \t]*task[ \t]+\d+\b[^\n]*$", re.IGNORECASE | re.MULTILINE)
_WORD = re.compile(r"\w+")
_MARKS = str.maketrans("", "", ".,;:!?\"'()*")
_STUTTER = re.compile(rf"(\w{{1,8}}?)\1{{{STUTTER - 1},}}")
_DECLINES = re.compile(
    r"(?:i['\u2019]?m|i am) (?:\w+ )?sorry|sorry,|as an ai\b|(?:i['\u2019]?m|i am) (?:unable|not able)\b"
    r"|i (?:can ?not|can['\u2019]?t|won['\u2019]?t|will not|must decline)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class PassedAnswer:
    """The reasoning to keep, and the teacher's labels for the parts whose label is unknown."""

    reasoning: str
    judged: dict[Target, GoldLabel] = field(default_factory=dict)


@dataclass(frozen=True)
class RejectedAnswer:
    """The reason why an answer is not kept."""

    reason: str


def gate(text: str, sample: Sample, finish_reason: str) -> PassedAnswer | RejectedAnswer:
    """Accept or reject an answer. Protocol markers in accepted reasoning are neutralised."""
    if not text.strip():
        return RejectedAnswer(EMPTY)
    if finish_reason == "content_filter" or is_refusal(text):
        return RejectedAnswer(REFUSAL)
    if _loops(text):
        return RejectedAnswer(LOOP)
    if len(text) > MOST_CHARACTERS:
        return RejectedAnswer(TOO_LONG)
    if mending.REPLACEMENT in text and mending.REPLACEMENT not in f"{sample.prompt}{sample.response}":
        return RejectedAnswer(BROKEN)
    exists = present(sample)
    parsed = parse_verdict(text, exists["request"], exists["response"], finish_reason)
    if parsed.reason:
        return RejectedAnswer(f"{UNPARSABLE}{parsed.reason}")
    labels = {"request": parsed.request, "response": parsed.response}
    truth = known(sample)
    if any(labels[target] != label for target, label in truth.items()):
        return RejectedAnswer(CONTRADICTION)
    reasoning = parsed.reasoning or ""
    fault = _fault_of(steps_of(reasoning))
    if fault:
        return RejectedAnswer(fault)
    judged = {target: GOLD[labels[target]] for target in TARGETS if exists[target] and target not in truth}
    return PassedAnswer(neutralise(reasoning), judged)


def steps_of(reasoning: str) -> list[str]:
    """The text below each heading `Reasoning Step N` or `Step N:`; empty steps are left out."""
    pieces = _HEADING.split(_TASK.sub("", reasoning))[1:]
    return [piece.strip() for piece in pieces if piece.strip()]


def _fault_of(steps: list[str]) -> str | None:
    if not steps:
        return NO_STEPS
    if len(steps) > MOST_STEPS:
        return TOO_MANY_STEPS
    # Not `is_refusal`: a valid step may begin with "It is illegal".
    if _DECLINES.match(steps[0].lstrip("\"'*# ")):
        return REFUSAL
    if max(Counter(" ".join(_WORD.findall(step.lower())) for step in steps).values()) > 1:
        return LOOP
    return None


def _loops(text: str) -> bool:
    """Whether a word or phrase repeats in the first 2 * `MOST_CHARACTERS` characters."""
    text = text[: 2 * MOST_CHARACTERS]
    words = text.lower().translate(_MARKS).split()
    # Cheap tests first: a stutter is one long word, and a loop repeats each of its three-word sequences.
    if max(map(len, words), default=0) >= STUTTER and _STUTTER.search(text):
        return True
    if max(Counter(zip(words, words[1:], words[2:], strict=False)).values(), default=0) < LOOP_TIMES - 1:
        return False
    return any(_repeats(words, size) for size in range(1, LOOP_PHRASE + 1))


def _repeats(words: list[str], size: int) -> bool:
    """Whether a phrase of `size` words repeats often enough in a row to be a loop."""
    run = max(LOOP_TIMES * size, LOOP_WORDS) - size
    return b"\1" * run in bytes(map(eq, words[size:], words))
