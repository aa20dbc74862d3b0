"""The texts that a guard generates in each mode and is trained on (docs/protocol.md, sections 3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

SLOW_PREFIX = ""
FAST_PREFIX = "<think>\n</think>\n<result>\nAnswers:\nRequest:"
RESPONSE_FIELD = "\nResponse:"
CANDIDATES = (" harmful", " unharmful")
"""The label words after a field's colon; the first is the positive class."""

END_OF_THINK = "</think>"
END_OF_RESULT = "</result>"
MAX_TOKENS_AFTER_RESULT = 8

Written: TypeAlias = Literal["harmful", "unharmful", "None"]


@dataclass(frozen=True)
class Span:
    """A part of the assistant's text, and whether it contributes to the loss."""

    text: str
    loss: bool


@dataclass(frozen=True)
class TargetLabel:
    """The word in a field; an unknown label is a pseudo-label without loss."""

    word: Written
    known: bool = True


def training_target(
    reasoning: str | Sequence[Span] | None, request: TargetLabel, response: TargetLabel
) -> tuple[Span, ...]:
    """The assistant's text to train on, without the end-of-turn token (which contributes to the loss).

    With reasoning, everything except unknown labels contributes to the loss. Without reasoning, the empty think and the
    result's head are context, as in `fast` mode, so that `slow` mode never learns to skip reasoning.
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
