"""What is special to the scripted engine; the conformance suite tests the rest."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from guardreasoner_vl.engines.base import EngineRequest, EngineResult
from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.errors import EngineError, InputTooLongError
from guardreasoner_vl.protocol import CANDIDATES, FAST_PREFIX
from tests.builders import answer
from tests.engines.conformance import SLOTS, asked

ANSWER = answer("unharmful", "harmful")


def test_answers_in_order_then_runs_out() -> None:
    engine = ScriptedEngine(["one", EngineResult("two", "length")])
    first, second, third = engine.generate([asked("a"), asked("b"), asked("c")])
    assert (first.text, first.finish_reason) == ("one", "stop")
    assert (second.text, second.finish_reason) == ("two", "length")
    assert (third.text, third.finish_reason) == ("", "error")
    assert third.error == "the script has only 2 answers: add more"
    assert engine.requests == [asked("a"), asked("b"), asked("c")]


def test_a_guard_error_is_that_request_s_fault() -> None:
    def answer(request: EngineRequest) -> str:
        raise InputTooLongError("too long")

    (result,) = ScriptedEngine(answer).generate([asked()])
    assert (result.finish_reason, result.error, result.error_code) == ("error", "too long", "input_too_long")


def test_forced_prefix_is_not_doubled() -> None:
    engine = ScriptedEngine([FAST_PREFIX + " harmful", " harmful"])
    whole, rest = engine.generate([asked(forced_prefix=FAST_PREFIX)] * 2)
    assert whole.text == rest.text == FAST_PREFIX + " harmful"


def test_written_labels_are_confident() -> None:
    request = replace(asked(), label_fields=("Request:", "Response:"), candidates=CANDIDATES)
    (result,) = ScriptedEngine([ANSWER]).generate([request])
    assert [math.exp(share) for share in result.label_logprobs["Request:"]] == pytest.approx([0.1, 0.9])
    assert [math.exp(share) for share in result.label_logprobs["Response:"]] == pytest.approx([0.9, 0.1])


def test_a_word_that_is_no_candidate_has_no_score() -> None:
    request = replace(asked(forced_prefix=FAST_PREFIX), label_fields=("Request:",), candidates=CANDIDATES)
    (result,) = ScriptedEngine([" None\n</result>"]).generate([request])
    assert result.label_logprobs == {}


def test_scores_favour_the_first_candidate_by_default() -> None:
    (result,) = ScriptedEngine([]).score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)
    assert result.chosen == (0, 0)
    assert math.exp(result.logprobs[0][0]) == pytest.approx(0.9)

    def scores(request: EngineRequest, slot: str) -> tuple[float, ...]:
        return (-3.0, -0.1) if slot == "" else (-0.2, -2.0)

    (result,) = ScriptedEngine([], scores=scores).score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)
    assert result.logprobs == ((-3.0, -0.1), (-0.2, -2.0))
    assert result.chosen == (1, 0)


def test_a_scorer_s_fault_is_a_result() -> None:
    def broken(request: EngineRequest, slot: str) -> tuple[float, ...]:
        raise EngineError("no scores today")

    (result,) = ScriptedEngine([], scores=broken).score([asked()], SLOTS, CANDIDATES)
    assert (result.error, result.logprobs) == ("no scores today", ())
