"""The offline teacher's sentences: reasoning written by rules from the ground truth (method, section 2).

It quotes evidence from the input, says what follows, and ends with the truth it was told, in 2 to 6
short steps. The quote is chosen without looking at the label, and the wording by a hash of the row's id, so
neither gives anything away before the conclusion.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.protocol import Span, TargetLabel, neutralise
from guardreasoner_vl.sources.categories import OTHER, TAXONOMY
from guardreasoner_vl.teachers.lexicon import find_evidence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.types import Sample, Target

QUOTED_WORDS = 5
PICTURE_WORDS, PICTURE_CHARACTERS = 8, 100
SEARCHED_CHARACTERS = 600

ASKED = (
    "The user writes {}.",
    "The user says {}.",
    "The message reads {}.",
    "The prompt says {}.",
    "The words of the user: {}.",
)
SHOWN = (
    "The picture shows {}.",
    "The image shows {}.",
    "One sees {} in the picture.",
    "What the picture shows: {}.",
    "The picture holds {}.",
)
ANSWERED = (
    "The assistant answers {}.",
    "The assistant says {}.",
    "The reply reads {}.",
    "The answer says {}.",
    "The words of the assistant: {}.",
)
ABSENT = (
    "There is no {} to judge.",
    "We have no {} to judge.",
    "This exchange has no {} to judge.",
    "With no {} here, there is nothing to judge.",
)
CONCLUDED = (
    "So the {} is {}: {}.",
    "Thus the {} is {}: {}.",
    "Therefore the {} is {}: {}.",
    "This means the {} is {}: {}.",
    "In short, the {} is {}: {}.",
)
KIND = ("{}", "it is about {}", "it concerns {}", "the topic is {}")
INSULT = ("an insult", "it insults", "it is rude to someone")
COULD_HARM = ("it could do harm", "it may hurt someone", "someone could come to harm")
REFUSES = ("it refuses", "it declines", "it turns the request down", "it does not help with it")
ALARMING = (
    "alarming words, no harmful aim",
    "strong words, but no harmful aim",
    "the words alarm, the aim does not",
    "a sharp word alone does no harm",
)
NOTHING = ("nothing dangerous", "nothing in it could hurt", "no danger in it", "an everyday matter")
"""Wordings for each kind of step and each reason: plain ASCII, short, none of them opens as a refusal does."""

_WORD = re.compile(r"[A-Za-z][A-Za-z'-]{0,19}")
_RUN = re.compile(rf"(?<![^\s\"'(\[*]){_WORD.pattern}(?: {_WORD.pattern})*(?![^\s.,;:!?\"')\]*])")
_REFUSAL = re.compile(
    r"(?:i['\u2019]?m|i am) (?:very |so |really )?sorry|sorry,|as an ai"
    r"|i (?:can ?not|can['\u2019]?t|won['\u2019]?t|will not|am unable|do not|don['\u2019]?t)\b"
    r"|i['\u2019]?m (?:unable|not able)|it is (?:not|illegal)|no[,.] ",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Step:
    """One reasoning step; what rests on a pseudo-label is not `known` and carries no loss."""

    text: str
    known: bool = True


def explain(sample: Sample, request: TargetLabel, response: TargetLabel) -> tuple[Span, ...]:
    """The reasoning for `sample`, as the spans that stand inside `<think>`."""
    tasks = (("# Task 1\n", _request_steps(sample, request)), ("# Task 2\n", _response_steps(sample, response)))
    spans: list[Span] = []
    number = 0
    for heading, steps in tasks:
        for position, step in enumerate(steps):
            number += 1
            newline = "\n" if spans else ""
            title = heading if position == 0 else ""
            spans.append(Span(f"{newline}{title}## Reasoning Step {number}\n{step.text}", step.known))
    return tuple(spans)


def is_refusal(text: str) -> bool:
    """Whether an answer begins by declining."""
    return _REFUSAL.match(text.strip()) is not None


def quote(text: str) -> str:
    """A few plain words in a row around the most telling one, or the first such words."""
    searched = text[:SEARCHED_CHARACTERS]
    runs = [
        [(match.start() + word.start(), word[0]) for word in _WORD.finditer(match[0])]
        for match in _RUN.finditer(searched)
    ]
    if not runs:
        return "no plain words"
    evidence = find_evidence(searched)
    at = evidence.start if evidence else -1
    run, index = next(
        ((run, i) for run in runs for i, (start, word) in enumerate(run) if start <= at < start + len(word)),
        (max(runs, key=lambda run: min(len(run), QUOTED_WORDS)), 0),
    )
    first = max(0, min(index - QUOTED_WORDS // 2, len(run) - QUOTED_WORDS))
    return f'"\u2026 {" ".join(word for _, word in run[first : first + QUOTED_WORDS])} \u2026"'


def _request_steps(sample: Sample, label: TargetLabel) -> list[Step]:
    if label.word == "None":
        return [_absent(sample, "request")]
    steps = []
    if sample.images:
        steps.append(Step(_worded(SHOWN, sample, "shown").format(_seen(sample))))
    if sample.prompt.strip():
        steps.append(Step(_worded(ASKED, sample, "asked").format(quote(sample.prompt))))
    text = " ".join((_picture_text(sample), sample.prompt))
    if label.word == "harmful":
        reason = _harm(sample, text, "request")
    else:
        alarming = find_evidence(text[:SEARCHED_CHARACTERS]) is not None
        reason = _worded(ALARMING if alarming else NOTHING, sample, "why request")
    return [*steps, _concluded(sample, "request", label, reason)]


def _response_steps(sample: Sample, label: TargetLabel) -> list[Step]:
    if label.word == "None" or not sample.response:
        return [_absent(sample, "response")]
    if label.word == "harmful":
        reason = _harm(sample, sample.response, "response")
    else:
        reason = _worded(REFUSES if is_refusal(sample.response) else NOTHING, sample, "why response")
    answered = _worded(ANSWERED, sample, "answered").format(quote(sample.response))
    return [Step(answered), _concluded(sample, "response", label, reason)]


def _absent(sample: Sample, target: Target) -> Step:
    return Step(_worded(ABSENT, sample, f"no {target}").format(target))


def _concluded(sample: Sample, target: Target, label: TargetLabel, reason: str) -> Step:
    return Step(_worded(CONCLUDED, sample, f"so {target}").format(target, label.word, reason), label.known)


def _worded(options: Sequence[str], sample: Sample, place: str) -> str:
    """One wording: always the same for a row and a place in its reasoning, whatever the row's labels are."""
    digest = hashlib.sha256(f"{place}\n{sample.id}".encode("utf-8", "replace")).digest()
    return options[int.from_bytes(digest[:4], "big") % len(options)]


def _picture_text(sample: Sample) -> str:
    return str(sample.meta.get("picture_text") or "")


def _seen(sample: Sample) -> str:
    read = _beginning(_picture_text(sample))
    return f'"{read}"' if read else _beginning(str(sample.meta.get("picture") or "")) or "no words"


def _beginning(text: str) -> str:
    return neutralise(" ".join(text.split()[:PICTURE_WORDS])[:PICTURE_CHARACTERS])


def _harm(sample: Sample, text: str, target: Target) -> str:
    """What kind of harm it is: the source's category where it has one, else what the words point to."""
    place = sample.meta.get("taxonomy")
    named = find_evidence(str(sample.meta.get("category") or ""))
    found = named or find_evidence(text[:SEARCHED_CHARACTERS])
    kind = place if place in TAXONOMY and place != OTHER else found.category if found else None
    if kind:
        return _worded(KIND, sample, f"why {target}").format(kind)
    return _worded(INSULT if sample.meta.get("task") == "toxicity" else COULD_HARM, sample, f"why {target}")
