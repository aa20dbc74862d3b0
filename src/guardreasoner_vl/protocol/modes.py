"""What a guard is made to write, in each mode and in training (protocol, sections 3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

SLOW_PREFIX = ""
FAST_PREFIX = "<think>\n</think>\n<result>\nAnswers:\nRequest:"
RESPONSE_FIELD = "\nResponse:"
CANDIDATES = (" harmful", " unharmful")
"""Label words as they follow a field's colon; the first one is the positive class."""

END_OF_THINK = "</think>"
END_OF_RESULT = "</result>"
MAX_TOKENS_AFTER_RESULT = 8

Written: TypeAlias = Literal["harmful", "unharmful", "None"]


@dataclass(frozen=True)
class Span:
    """A piece of the assistant's text and whether it carries loss."""

    text: str
    loss: bool


@dataclass(frozen=True)
class TargetLabel:
    """The word in a field; a pseudo-label stands there without loss."""

    word: Written
    known: bool = True


def training_target(
    reasoning: str | Sequence[Span] | None, request: TargetLabel, response: TargetLabel
) -> tuple[Span, ...]:
    """The assistant's text, end-of-turn token not included (it carries loss).

    With reasoning everything carries loss but unknown labels. Without reasoning the empty think and the
    result's head are context, as in `fast` mode, so that `slow` never learns to skip reasoning.
    """
    if reasoning is None:
        head: tuple[Span, ...] = (Span(FAST_PREFIX, False),)
    else:
        steps = (Span(reasoning, True),) if isinstance(reasoning, str) else tuple(reasoning)
        head = (Span("<think>\n", True), *steps, Span("\n</think>\n<result>\nAnswers:\nRequest:", True))
    return (
        *head,
        Span(f" {request.word}", request.known),
        Span(RESPONSE_FIELD, True),
        Span(f" {response.word}", response.known),
        Span("\n</result>", True),
    )
