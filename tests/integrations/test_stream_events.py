"""The parts of streamed and complete answers that are judged in addition to their texts."""

from __future__ import annotations

from typing import Any

import pytest

from guardreasoner_vl.integrations.stream_events import StreamedAnswers, completion_parts
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
    """A server may omit the reasoning from the texts but not from the log-probabilities."""
    message = {"role": "assistant", "content": "Fine."}
    (whole,) = completion_parts({"choices": [{"message": message, "logprobs": logprobs(*tokens)}]})
    answers = StreamedAnswers()
    for token in tokens:
        answers.chunk({"choices": [{"index": 0, "delta": {}, "logprobs": logprobs(token)}]})
    assert answers.characters == len("".join(tokens))
    answers.chunk({"choices": [{"index": 0, "delta": {"content": "Fine."}, "logprobs": None}]})
    (grown,) = answers.parts
    assert texts_of(whole) == texts_of(grown) == judged
