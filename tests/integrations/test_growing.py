"""What of an answer that grows, or of a whole one, is judged beside its texts."""

from __future__ import annotations

from typing import Any

import pytest

from guardreasoner_vl.integrations.growing import GrowingAnswers, completion_parts
from guardreasoner_vl.service.parts import texts_of


def logprobs(*tokens: str) -> dict[str, Any]:
    return {"content": [{"token": token, "logprob": -0.5} for token in tokens]}


@pytest.mark.parametrize(
    ("tokens", "judged"),
    [
        (("Fi", "ne."), ["Fine."]),
        ((), ["Fine."]),
        (("<think>", "BA", "D", "</think>", "Fine."), ["Fine.", "<think>BAD</think>Fine."]),
    ],
)
def test_tokens_that_no_text_holds_are_judged(tokens: tuple[str, ...], judged: list[str]) -> None:
    """A server may leave the reasoning out of the texts, and not out of the log-probabilities."""
    message = {"role": "assistant", "content": "Fine."}
    (whole,) = completion_parts({"choices": [{"message": message, "logprobs": logprobs(*tokens)}]})
    growing = GrowingAnswers()
    for token in tokens:
        growing.chunk({"choices": [{"index": 0, "delta": {}, "logprobs": logprobs(token)}]})
    assert growing.came == len("".join(tokens))
    growing.chunk({"choices": [{"index": 0, "delta": {"content": "Fine."}, "logprobs": None}]})
    (grown,) = growing.parts
    assert texts_of(whole) == texts_of(grown) == judged
