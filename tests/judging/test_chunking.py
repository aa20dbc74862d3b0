"""Windows by hand: which prompts are counted, at which lengths a text is split, and which verdict is the worst."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.errors import InputTooLongError
from guardreasoner_vl.judging.chunking import merge_worst, split_to_context
from guardreasoner_vl.judging.effects import CountCall, TokenCount, build_request
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.types import Exchange, Judgement, Label, ModelInfo, Turn, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.engines.base import EngineRequest
    from guardreasoner_vl.judging.chunking import Chunks

POLICY = Policy(window_overlap=0.2)


def marks(limit: int) -> Callable[[EngineRequest], TokenCount]:
    """Counts each # as one token; the model reads `limit` tokens, a prompt has three quarters of them."""
    return lambda request: TokenCount(request.messages[1].text.count("#"), limit)


def split(
    exchange: Exchange, count: Callable[[EngineRequest], TokenCount], policy: Policy = POLICY
) -> tuple[Chunks, list[EngineRequest]]:
    """The chunks, and the requests whose tokens were counted."""
    counted: list[EngineRequest] = []
    steps = split_to_context(exchange, policy)
    try:
        call = next(steps)
        while True:
            assert isinstance(call, CountCall)
            counted.append(call.request)
            call = steps.send(count(call.request))
    except StopIteration as stop:
        return stop.value, counted


def asked(exchange: Exchange, prompt: str | None, response: str | None = None) -> EngineRequest:
    return build_request(replace(exchange, prompt=prompt, response=response), POLICY)


def lengths(chunks: Chunks) -> list[list[int]]:
    return [[len(chunk or "") for chunk in side] for side in chunks]


@pytest.mark.parametrize(
    "exchange",
    [
        Exchange("#" * 3000),
        Exchange("#" * 3000, response="#" * 1500),
        Exchange(response="#" * 3000),
        Exchange("#" * 3000, history=(Turn("#" * 100),)),
    ],
)
def test_the_whole_is_counted_first_then_one_character_of_each_part(exchange: Exchange) -> None:
    _, counted = split(exchange, marks(2800))
    short = [text and "x" for text in (exchange.prompt, exchange.response)]
    assert counted[:2] == [build_request(exchange, POLICY), asked(exchange, *short)]


def test_the_first_windows_have_two_thirds_of_the_longer_part() -> None:
    exchange = Exchange("#" * 3000)
    chunks, counted = split(exchange, marks(2800))
    assert lengths(chunks) == [[2000, 1400], [0]]
    assert counted[2:] == [asked(exchange, "#" * 2000), asked(exchange, "#" * 1400)]
    response = Exchange("##", response="#" * 3000)
    chunks, counted = split(response, marks(2800))
    assert lengths(chunks) == [[2], [2000, 1400]]
    assert counted[:2] == [build_request(response, POLICY), asked(response, "x", "x")]
    assert counted[2:] == [asked(response, "##", "#" * 2000), asked(response, "##", "#" * 1400)]


def test_windows_shrink_to_the_tokens_that_remain_beside_the_history() -> None:
    """500 tokens of history and 2,000 of a window exceed 1,500: 2,000 x 0.97 x 1,000 / 2,000 characters are next."""
    chunks, counted = split(Exchange("#" * 3000, history=(Turn("#" * 500),)), marks(2000))
    assert lengths(chunks) == [[970, 970, 970, 672], [0]]
    assert len(counted) == 2 + 1 + 4


def test_twenty_thousand_characters_that_fit_are_counted_once() -> None:
    exchange = Exchange("#" * 12_000, response="#" * 8_000)
    chunks, counted = split(exchange, marks(40_000))
    assert chunks == ([exchange.prompt], [exchange.response])
    assert counted == [build_request(exchange, POLICY)]


def test_twenty_thousand_characters_that_do_not_fit_are_counted_whole_once() -> None:
    exchange = Exchange("#" * 20_000)
    chunks, counted = split(exchange, marks(20_000))
    assert lengths(chunks) == [[13_333, 9_334], [0]]
    assert counted.count(build_request(exchange, POLICY)) == 1


@pytest.mark.parametrize("characters", [20_001, 32_000])
def test_a_longer_text_is_counted_whole_where_sixteen_characters_may_be_a_token(characters: int) -> None:
    exchange = Exchange("#" + "-" * (characters - 1))
    chunks, counted = split(exchange, marks(2000))
    assert chunks == ([exchange.prompt], [None])
    assert counted == [asked(exchange, "x"), build_request(exchange, POLICY)]


def test_a_text_of_more_than_sixteen_characters_a_token_is_never_counted_whole() -> None:
    exchange = Exchange("#" + "-" * 32_000)
    chunks, counted = split(exchange, marks(2000))
    assert lengths(chunks) == [[21_334, 14_934], [0]]
    assert build_request(exchange, POLICY) not in counted
    chunks, _ = split(Exchange("-" * 60_000), marks(2000))
    assert lengths(chunks)[0][0] == 32_000


@pytest.mark.parametrize("count", [TokenCount(None, 2000), TokenCount(5, None), TokenCount(None, None)])
@pytest.mark.parametrize("characters", [100, 25_000])
def test_an_engine_that_cannot_count_gets_the_whole(count: TokenCount, characters: int) -> None:
    exchange = Exchange("#" * characters)
    chunks, counted = split(exchange, lambda _: count)
    assert chunks == ([exchange.prompt], [None])
    assert len(counted) == 1


def test_a_history_that_leaves_no_room_is_an_error_with_its_remedy() -> None:
    with pytest.raises(InputTooLongError) as caught:
        split(Exchange("Bread?", history=(Turn("#" * 1600),)), marks(2000))
    assert str(caught.value) == (
        "history and images alone take 1600 of the 2000 tokens that the model reads: remove some of them"
    )


def test_a_history_that_cannot_fit_is_refused_without_being_counted() -> None:
    """16 characters for each token that the model reads: more than 32,000 cannot fit into 2,000 tokens."""
    counted: list[EngineRequest] = []

    def count(request: EngineRequest) -> TokenCount:
        counted.append(request)
        return marks(2000)(request)

    with pytest.raises(InputTooLongError, match="the history's 32,001 characters cannot fit into the 2000 tokens"):
        split(Exchange("Bread?", history=(Turn("#" * 16_001, response="#" * 16_000),)), count)
    assert counted == [asked(Exchange("x"), "x")]
    with pytest.raises(InputTooLongError, match="history and images alone take 32000"):
        split(Exchange("Bread?", history=(Turn("#" * 16_000, response="#" * 16_000),)), marks(2000))


def test_a_long_history_of_few_tokens_is_judged_whole() -> None:
    exchange = Exchange("Bread?", history=(Turn("-" * 25_000),))
    assert split(exchange, marks(2000))[0] == (["Bread?"], [None])


def test_too_many_windows_are_an_error_with_its_remedy() -> None:
    with pytest.raises(InputTooLongError) as caught:
        split(Exchange("#" * 3000), marks(2800), replace(POLICY, max_windows=1))
    assert str(caught.value) == (
        "the exchange's 3,000 characters need more than 1 windows of the model's 2800 tokens: raise max_windows "
        "(limits.windows of the service), or remove text, history or images"
    )


def verdict(name: str, flagged: bool, request: float | None, response: float | None) -> Verdict:
    label = Label.HARMFUL if flagged else Label.UNHARMFUL
    return Verdict(
        request=Judgement(label=label, score=request),
        response=Judgement(label=Label.UNHARMFUL, score=response),
        flagged=flagged,
        action="block" if flagged else "allow",
        reasoning=name,
        mode="slow",
        model=ModelInfo(name="toy"),
    )


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ((True, 0.4, None), (False, 0.9, None)),
        ((False, 0.3, 0.1), (False, 0.2, 0.2)),
        ((False, 0.1, 0.3), (False, 0.2, 0.2)),
        ((False, 0.3, 0.3), (False, None, 0.2)),
        ((False, 0.3, 0.3), (False, 0.2, None)),
    ],
)
def test_the_worst_is_flagged_or_else_has_the_highest_score(
    worse: tuple[bool, float | None, float | None], better: tuple[bool, float | None, float | None]
) -> None:
    pair = [verdict("worse", *worse), verdict("better", *better)]
    assert merge_worst(pair).reasoning == merge_worst(pair[::-1]).reasoning == "worse"
