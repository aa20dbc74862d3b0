"""The request to the model, and replies of the wrong kind."""

from __future__ import annotations

import pytest

from guardreasoner_vl.engines.base import EngineResult, ScoreResult
from guardreasoner_vl.images.geometry import PixelBudget
from guardreasoner_vl.judging.effects import TokenCount, build_request, call_count, call_generate, call_score
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.protocol import build_messages
from guardreasoner_vl.types import CheckedImage, Exchange, Turn

REQUEST = build_request(Exchange("Bread?"), Policy())


def test_a_request_has_the_messages_the_images_in_order_and_the_policys_pixels() -> None:
    first, second = (CheckedImage(b"never decoded", size, size) for size in (28, 56))
    exchange = Exchange("Bread?", (second,), history=(Turn("Cake?", (first,)),))
    budget = PixelBudget(max_pixels=56 * 56)
    request = build_request(exchange, Policy(pixels=budget))
    assert (request.messages, request.images, request.pixels) == (build_messages(exchange), (first, second), budget)
    assert build_request(exchange, Policy()).pixels is None


def test_a_reply_of_the_kind_of_its_call_is_returned() -> None:
    for steps, reply in (
        (call_generate(REQUEST), EngineResult("Yes.", "stop")),
        (call_score(REQUEST, ("",)), ScoreResult(((-1.0, -2.0),), (0,))),
        (call_count(REQUEST), TokenCount(5, 10)),
    ):
        next(steps)
        with pytest.raises(StopIteration) as stopped:
            steps.send(reply)
        assert stopped.value.value is reply


def test_a_reply_of_another_kind_is_named() -> None:
    steps = call_count(REQUEST)
    next(steps)
    with pytest.raises(TypeError) as caught:
        steps.send(EngineResult("Yes.", "stop"))
    assert str(caught.value) == "expected a TokenCount, got a EngineResult"
