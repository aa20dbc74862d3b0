"""Rewards by hand (docs/method.md, section 5; docs/protocol.md, section 5)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.protocol import parse_verdict
from guardreasoner_vl.recipe import RewardSection, parse_recipe
from guardreasoner_vl.rl.reward import Reward, accuracy, format_reward, normalised_length, reward
from guardreasoner_vl.types import Sample

H, U = "harmful", "unharmful"
PAPER = RewardSection()


def sample(**fields: Any) -> Sample:
    """A prompt with a known label and a response with another, unless said otherwise."""
    content = {"prompt": "How do I bake?", "response": "With flour.", "request_label": H, "response_label": U, **fields}
    return Sample.model_validate({"id": "a", "source": "toy", "modality": "text", **content})


def said(request: str, response: str | None, row: Sample, finish: str = "stop") -> Any:
    last = "" if response is None else f"\nResponse: {response}"
    text = f"<think>\nwell\n</think>\n<result>\nAnswers:\nRequest: {request}{last}\n</result>"
    exchange = row.exchange()
    return parse_verdict(text, exchange.has_prompt, exchange.has_response, finish)


@pytest.mark.parametrize(
    ("request_said", "response_said", "fields", "right"),
    [
        (H, U, {}, 1.0),
        (U, U, {}, 0.5),
        (U, H, {}, 0.0),
        (H, H, {"response_label": None}, 1.0),  # one known label: its weight is 1
        (U, U, {"response_label": None}, 0.0),
        (U, U, {"request_label": None}, 1.0),
        (H, "None", {"response": None, "response_label": None}, 1.0),
        (H, None, {"response": None, "response_label": None}, 1.0),
        (H, U, {"response": None, "response_label": None}, 1.0),
        (H, H, {"response": None, "response_label": None}, 0.5),
        (U, H, {"response": None, "response_label": None}, 0.0),
        ("None", U, {"prompt": "", "request_label": None}, 1.0),
        (H, U, {"prompt": "", "request_label": None}, 0.5),
        (H, U, {"request_label": None, "response_label": None}, 0.0),
    ],
)
def test_accuracy(request_said: str, response_said: str | None, fields: dict[str, Any], right: float) -> None:
    row = sample(**fields)
    assert accuracy(said(request_said, response_said, row), row) == right


def test_format_is_the_parsers_word() -> None:
    row = sample()
    assert format_reward(said(H, U, row)) == 1
    for broken in (said("perhaps", U, row), said(H, None, row), said(H, U, row, "length")):
        assert (format_reward(broken), accuracy(broken, row)) == (0, 0)


def test_lengths() -> None:
    assert normalised_length(300, 3072, 1 / 32) == 300 / 3072
    assert normalised_length(10, 3072, 1 / 32) == 1 / 32
    assert normalised_length(4000, 3072, 1 / 32) == 1


@pytest.mark.parametrize(
    ("tokens", "beta", "total"),
    [
        (96, 1.0, -1024.0),
        (50, 1.0, -1024.0),
        (512, 1.0, -36.0),
        (3072, 1.0, -1.0),
        (512, 1 / 6, -36.0),
        (3072, 1 / 6, -36.0),
    ],
)
def test_the_papers_form_for_a_wholly_wrong_answer(tokens: int, beta: float, total: float) -> None:
    row = sample()
    result = reward(said(U, H, row), row, tokens, 3072, RewardSection(beta=beta))
    assert result.total == pytest.approx(total)
    assert (result.format, result.accuracy, result.safety) == (1, 0, 0)


def test_the_papers_form_ranks_a_half_right_short_answer_below_a_wrong_long_one() -> None:
    row = sample()
    half = reward(said(H, H, row), row, 200, 3072, PAPER).total
    wrong = reward(said(U, H, row), row, 400, 3072, PAPER).total
    assert half == pytest.approx(-0.5 * (3072 / 200) ** 2)  # -117.96
    assert wrong == pytest.approx(-((3072 / 400) ** 2))  # -58.98
    assert half < wrong


@pytest.mark.parametrize("form", ["paper", "bounded"])
def test_all_right_is_the_maximum_whatever_the_length(form: Any) -> None:
    row = sample()
    for tokens in (5, 300, 3072):
        assert reward(said(H, U, row), row, tokens, 3072, RewardSection(form=form)).total == 0


def test_an_answer_outside_the_grammar_counts_as_shortest() -> None:
    row = sample()
    broken = said(H, U, row, "length")
    assert reward(broken, row, 3000, 3072, PAPER) == Reward(0, 0, 0, 1 / 32, -1024)
    assert reward(broken, row, 3000, 3072, RewardSection(form="bounded", lam=0.5)).total == -1.5


@pytest.mark.parametrize(
    ("right", "tokens", "total"),
    [("none", 32, -1.484375), ("none", 512, -1.25), ("none", 1024, -1.0), ("half", 512, -0.625), ("none", 2000, -1.0)],
)
def test_the_bounded_form(right: str, tokens: int, total: float) -> None:
    row = sample()
    answer = said(U if right == "none" else H, H, row)
    section = RewardSection(form="bounded", lam=0.5, beta=0.5, min_length=1 / 64)
    assert reward(answer, row, tokens, 2048, section).total == pytest.approx(total)


def test_a_token_cost_on_right_answers_alone() -> None:
    row, section = sample(), RewardSection(form="bounded", token_cost=0.2)
    assert reward(said(H, U, row), row, 512, 2048, section).total == pytest.approx(-0.05)
    assert reward(said(U, H, row), row, 2048, 2048, section).total == -1


def test_the_plain_form_is_the_safety_reward() -> None:
    row, section = sample(), RewardSection(form="plain")
    assert [reward(said(a, b, row), row, 9, 99, section).total for a, b in ((H, U), (U, U), (U, H))] == [1, 0.5, 0]


@given(
    short=st.integers(1, 3072),
    longer=st.integers(1, 3072),
    beta=st.floats(0.05, 1),
    lam=st.floats(0, 1),
    labels=st.tuples(st.sampled_from((H, U)), st.sampled_from((H, U))),
)
def test_bounded_never_ranks_length_above_being_right(
    short: int, longer: int, beta: float, lam: float, labels: tuple[str, str]
) -> None:
    row, section = sample(), RewardSection(form="bounded", beta=beta, lam=lam)
    short, longer = sorted((short, longer))
    totals = {
        (name, tokens): reward(said(*words, row), row, tokens, 3072, section).total
        for name, words in (
            ("right", (H, U)),
            ("half", labels if labels in ((H, H), (U, U)) else (H, H)),
            ("wrong", (U, H)),
        )
        for tokens in (short, longer)
    }
    assert totals["right", short] >= totals["half", longer]
    assert totals["half", longer] >= totals["half", short]
    assert totals["wrong", longer] >= totals["wrong", short] >= -(1 + lam)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"beta": 0.03}, "min_length < beta"),
        ({"token_cost": 0.1}, "token_cost belongs to form: bounded"),
        ({"lam": 2}, "less than or equal to 1"),
    ],
)
def test_settings_that_cannot_be(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"name": "r", "grpo": {"reward": section}})
