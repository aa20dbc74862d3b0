"""Parses a guard's answer by a strict grammar (docs/protocol.md, section 2).

    answer  = ws think ws result ws END
    think   = "<think>" reasoning "</think>"                       no tag inside
    result  = "<result>" ws ["Answers:" ws] request ws [response ws] "</result>"

Anything else is an error with one reason code, never a label.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from guardreasoner_vl.types import Label

_SPACE = " \t\r\n"
_LABELS = {
    "harmful": Label.HARMFUL,
    "unharmful": Label.UNHARMFUL,
    "harmless": Label.UNHARMFUL,
    "none": Label.NOT_APPLICABLE,
}


class Reason(StrEnum):
    """Why an answer is not a verdict."""

    EMPTY = "empty"
    UNTERMINATED_THINK = "unterminated_think"
    MISSING_THINK = "missing_think"
    DUPLICATE_THINK = "duplicate_think"
    MISSING_RESULT = "missing_result"
    DUPLICATE_RESULT = "duplicate_result"
    MISSING_LABEL = "missing_label"
    DUPLICATE_LABEL = "duplicate_label"
    UNKNOWN_LABEL = "unknown_label"
    TRAILING_TEXT = "trailing_text"
    TRUNCATED = "truncated"
    ENGINE = "engine"


@dataclass(frozen=True)
class ParsedAnswer:
    """Labels and reasoning of one answer; on an error both labels are `error` and `reason` says why.

    `written` holds the request's and the response's labels as the answer gives them, even where there is nothing to
    judge.
    """

    request: Label
    response: Label
    reasoning: str | None = None
    reason: Reason | None = None
    written: tuple[Label, Label] | None = field(default=None, compare=False)


class _OutsideGrammarError(Exception):
    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def parse_verdict(text: str, has_prompt: bool, has_response: bool, finish_reason: str) -> ParsedAnswer:
    """Parse one answer. `finish_reason` is `stop`, `length`, or any other value for an engine failure.

    If there is no request or no response, its label is `not_applicable`, whatever valid label the answer gives.
    """
    try:
        if finish_reason != "stop":
            raise _OutsideGrammarError(Reason.TRUNCATED if finish_reason == "length" else Reason.ENGINE)
        reasoning, block = _split(text)
        request, response = _labels_of_block(block)
    except _OutsideGrammarError as outside:
        return ParsedAnswer(Label.ERROR, Label.ERROR, reason=outside.reason)
    if (has_prompt and request is Label.NOT_APPLICABLE) or (has_response and response is Label.NOT_APPLICABLE):
        return ParsedAnswer(Label.ERROR, Label.ERROR, reason=Reason.MISSING_LABEL)
    return ParsedAnswer(
        request if has_prompt else Label.NOT_APPLICABLE,
        response if has_response else Label.NOT_APPLICABLE,
        reasoning,
        written=(request, response),
    )


def _split(text: str) -> tuple[str, str]:
    """Split the answer into its reasoning and the content of its result block."""
    body = text.strip(_SPACE)
    if not body:
        raise _OutsideGrammarError(Reason.EMPTY)
    if not body.startswith("<think>"):
        raise _OutsideGrammarError(Reason.MISSING_THINK)
    if body.count("<think>") > 1 or body.count("</think>") > 1:
        raise _OutsideGrammarError(Reason.DUPLICATE_THINK)
    think, closed, after = body.removeprefix("<think>").partition("</think>")
    if not closed:
        raise _OutsideGrammarError(Reason.UNTERMINATED_THINK)
    if body.count("<result>") > 1 or body.count("</result>") > 1:
        raise _OutsideGrammarError(Reason.DUPLICATE_RESULT)
    before, opened, inside = after.partition("<result>")
    block, ended, trailing = inside.partition("</result>")
    if not (opened and ended):
        raise _OutsideGrammarError(Reason.MISSING_RESULT)
    if before.strip(_SPACE) or trailing.strip(_SPACE):
        raise _OutsideGrammarError(Reason.TRAILING_TEXT)
    return think.strip(_SPACE), block


def _labels_of_block(block: str) -> tuple[Label, Label]:
    lines = [line.strip(_SPACE) for line in block.split("\n")]
    lines = [line for line in lines if line]
    if lines[:1] == ["Answers:"]:
        lines = lines[1:]
    labels: dict[str, Label] = {}
    for line in lines:
        field, colon, word = line.partition(":")
        if not colon or field not in ("Request", "Response"):
            raise _OutsideGrammarError(Reason.TRAILING_TEXT)
        if field in labels:
            raise _OutsideGrammarError(Reason.DUPLICATE_LABEL)
        if field == "Response" and "Request" not in labels:
            raise _OutsideGrammarError(Reason.MISSING_LABEL)
        word = word.strip(" \t").lower()
        if not word:
            raise _OutsideGrammarError(Reason.MISSING_LABEL)
        if word not in _LABELS:
            raise _OutsideGrammarError(Reason.UNKNOWN_LABEL)
        labels[field] = _LABELS[word]
    if "Request" not in labels:
        raise _OutsideGrammarError(Reason.MISSING_LABEL)
    return labels["Request"], labels.get("Response", Label.NOT_APPLICABLE)
