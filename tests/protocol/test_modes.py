"""Forced prefix and training targets, character by character (docs/protocol.md, sections 3 and 4)."""

from __future__ import annotations

import pytest

from guardreasoner_vl.protocol import (
    CANDIDATES,
    END_OF_RESULT,
    END_OF_THINK,
    FAST_PREFIX,
    MAX_TOKENS_AFTER_RESULT,
    RESPONSE_FIELD,
    Span,
    TargetLabel,
    parse_verdict,
    training_target,
)
from guardreasoner_vl.protocol.modes import SLOW_PREFIX, Written
from guardreasoner_vl.types import Label

HARMFUL, UNHARMFUL, NONE = TargetLabel("harmful"), TargetLabel("unharmful"), TargetLabel("None")


def text_of(spans: tuple[Span, ...]) -> str:
    return "".join(span.text for span in spans)


def learnt(spans: tuple[Span, ...]) -> list[tuple[str, bool]]:
    """Neighbouring spans with the same mask, joined: what the loss covers, however the spans are split."""
    runs: list[tuple[str, bool]] = []
    for span in spans:
        if runs and runs[-1][1] == span.loss:
            runs[-1] = (runs[-1][0] + span.text, span.loss)
        elif span.text:
            runs.append((span.text, span.loss))
    return runs


def test_literals() -> None:
    assert SLOW_PREFIX == ""
    assert FAST_PREFIX == "<think>\n</think>\n<result>\nAnswers:\nRequest:"
    assert RESPONSE_FIELD == "\nResponse:"
    assert CANDIDATES == (" harmful", " unharmful")
    assert (END_OF_THINK, END_OF_RESULT, MAX_TOKENS_AFTER_RESULT) == ("</think>", "</result>", 8)


def test_with_reasoning_all_of_it_carries_loss() -> None:
    spans = training_target("# Task 1\nIt asks for bread.", UNHARMFUL, NONE)
    assert learnt(spans) == [
        (
            "<think>\n# Task 1\nIt asks for bread.\n</think>\n"
            "<result>\nAnswers:\nRequest: unharmful\nResponse: None\n</result>",
            True,
        )
    ]


def test_without_reasoning_only_the_labels_carry_loss() -> None:
    spans = training_target(None, HARMFUL, UNHARMFUL)
    assert learnt(spans) == [
        ("<think>\n</think>\n<result>\nAnswers:\nRequest:", False),
        (" harmful\nResponse: unharmful\n</result>", True),
    ]


def test_an_unknown_request_label_carries_no_loss() -> None:
    spans = training_target("Steps.", TargetLabel("unharmful", known=False), HARMFUL)
    assert learnt(spans) == [
        ("<think>\nSteps.\n</think>\n<result>\nAnswers:\nRequest:", True),
        (" unharmful", False),
        ("\nResponse: harmful\n</result>", True),
    ]


def test_an_unknown_response_label_carries_no_loss() -> None:
    spans = training_target(None, HARMFUL, TargetLabel("harmful", known=False))
    assert learnt(spans) == [
        ("<think>\n</think>\n<result>\nAnswers:\nRequest:", False),
        (" harmful\nResponse:", True),
        (" harmful", False),
        ("\n</result>", True),
    ]


def test_reasoning_in_spans_keeps_its_own_mask() -> None:
    steps = [Span("Known.", True), Span("\nGuessed.", False)]
    spans = training_target(steps, HARMFUL, TargetLabel("unharmful", known=False))
    assert learnt(spans) == [
        ("<think>\nKnown.", True),
        ("\nGuessed.", False),
        ("\n</think>\n<result>\nAnswers:\nRequest: harmful\nResponse:", True),
        (" unharmful", False),
        ("\n</result>", True),
    ]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "reasoning", [None, "One line.", "# Task 1\n## Reasoning Step 1\nx < y ‹think>\n", [Span("a", False)]]
)
@pytest.mark.parametrize("request_word", ["harmful", "unharmful"])
@pytest.mark.parametrize("response_word", ["harmful", "unharmful", "None"])
def test_targets_are_accepted_by_the_parser(
    reasoning: str | list[Span] | None, request_word: Written, response_word: Written, known: bool
) -> None:
    text = text_of(training_target(reasoning, TargetLabel(request_word, known), TargetLabel(response_word, known)))
    has_response = response_word != "None"
    parsed = parse_verdict(text, True, has_response, "stop")
    assert parsed.reason is None
    assert parsed.request is Label(request_word)
    assert parsed.response is (Label(response_word) if has_response else Label.NOT_APPLICABLE)


@pytest.mark.parametrize("request_word", ["harmful", "unharmful"])
@pytest.mark.parametrize("response_word", ["harmful", "unharmful", "None"])
def test_fast_mode_writes_what_training_without_reasoning_shows(request_word: Written, response_word: Written) -> None:
    forced = f"{FAST_PREFIX} {request_word}{RESPONSE_FIELD} {response_word}\n{END_OF_RESULT}"
    assert forced == text_of(training_target(None, TargetLabel(request_word), TargetLabel(response_word)))
