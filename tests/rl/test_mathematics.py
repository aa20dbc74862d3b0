"""Advantages, clipping and the loss by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.recipe import ClipSection, parse_recipe
from guardreasoner_vl.rl.advantages import group_advantages
from guardreasoner_vl.rl.clipping import bound
from guardreasoner_vl.rl.loss import clipped_loss


def test_advantages_by_hand() -> None:
    advantages = group_advantages(torch.tensor([[0.0, 1.0, 0.0, 1.0], [-4.0, -1.0, -1.0, 0.0]]))
    first = 0.5 / (math.sqrt(1 / 3) + 1e-4)  # deviation with n - 1
    assert advantages[0].tolist() == pytest.approx([-first, first, -first, first])
    deviation = math.sqrt((2.5**2 + 0.5**2 + 0.5**2 + 1.5**2) / 3) + 1e-4
    assert advantages[1].tolist() == pytest.approx(
        [-2.5 / deviation, 0.5 / deviation, 0.5 / deviation, 1.5 / deviation]
    )


def test_equal_rewards_have_no_advantage() -> None:
    advantages = group_advantages(torch.tensor([[-0.1] * 7, [-1024.0] * 7]))
    assert torch.equal(advantages, torch.zeros(2, 7))
    beside = group_advantages(torch.tensor([[-0.1] * 7, [0.0] * 6 + [1.0]]))
    assert torch.equal(beside[0], torch.zeros(7))
    assert beside[1, 6] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_no_numbers(bad: float) -> None:
    message = "^a reward is NaN or infinite: check grpo.reward.min_length and grpo.reward.form$"
    with pytest.raises(FloatingPointError, match=message):
        group_advantages(torch.tensor([[0.0, bad]]))


def test_the_product_falls_as_the_paper_has_it() -> None:
    section = ClipSection(epsilon=0.2)
    assert bound(section, 1, 24) == pytest.approx(0.2 * 23 / 24)
    assert bound(section, 2, 24) == pytest.approx(0.2 * 23 / 24 * 22 / 24)
    assert bound(section, 5, 24) / 0.2 == pytest.approx(0.5, abs=0.05)
    assert bound(section, 12, 24) == pytest.approx(0.0035, abs=1e-4)
    assert bound(section, 24, 24) == 0


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("product", [0.15, 0.075, 0.01875, 0.0]),
        ("linear", [0.15, 0.1, 0.05, 0.0]),
        ("cosine", [0.1 * (1 + math.sqrt(0.5)), 0.1, 0.1 * (1 - math.sqrt(0.5)), 0.0]),
        ("constant", [0.2] * 4),
    ],
)
def test_schedules_over_four_batches(schedule: Any, values: list[float]) -> None:
    section = ClipSection(schedule=schedule)
    assert [bound(section, s, 4) for s in (1, 2, 3, 4)] == pytest.approx(values)
    floored = ClipSection(schedule=schedule, floor=0.08)
    assert [bound(floored, s, 4) for s in (1, 2, 3, 4)] == pytest.approx([max(0.08, value) for value in values])


def test_batches_are_counted_from_one() -> None:
    for s in (0, 5):
        with pytest.raises(ValueError, match="of 4"):
            bound(ClipSection(), s, 4)


def test_the_loss_by_hand() -> None:
    ratios = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5])
    advantages = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0])
    weights = torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4])  # two completions of 3 and 2 tokens
    logprobs = ratios.log().requires_grad_()
    result = clipped_loss(logprobs, torch.zeros(5), advantages, weights, 0.2)
    # min(K A, clip(K) A): 2, 2.4 (clipped), 1; -1.5, -0.8 (clipped)
    assert result.loss.item() == pytest.approx(-((2 + 2.4 + 1) / 6 + (-1.5 - 0.8) / 4))
    assert result.clipped.tolist() == [False, True, False, False, True]
    torch.autograd.backward(result.loss)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-2 / 6, 0, -1 / 6, 1.5 / 4, 0])


def test_the_ratio_is_to_the_policy_that_sampled() -> None:
    logprobs, old = torch.tensor([0.3, 0.3]).log(), torch.tensor([0.2, 0.6]).log()
    clipped = clipped_loss(logprobs, old, torch.tensor([2.0, -2.0]), torch.tensor([1.0, 1.0]), 0.2)
    # K = 1.5 is cut to 1.2; K = 0.5 is cut to 0.8
    assert clipped.loss.item() == pytest.approx(-(1.2 * 2 - 0.8 * 2))
    assert clipped.clipped.tolist() == [True, True]


def test_only_what_the_bound_cut_off_is_counted_as_clipped() -> None:
    ratios = torch.tensor([1.5, 0.5, 1.0, 1.0, 0.5, 1.5, 1.5])
    advantages = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.5, -0.5, 0.5])
    clipped = clipped_loss(ratios.log(), torch.zeros(7), advantages, torch.ones(7), 0.2)
    assert clipped.clipped.tolist() == [False, False, False, False, False, False, True]


def test_a_ratio_on_the_bound_is_not_clipped() -> None:
    logprobs = torch.zeros(2).requires_grad_()
    clipped = clipped_loss(logprobs, torch.zeros(2), torch.tensor([1.0, -1.0]), torch.ones(2), 0.0)
    assert clipped.clipped.tolist() == [False, False]
    torch.autograd.backward(clipped.loss)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1, 1]  # the gradient that is said not to be cut off


def test_without_a_bound_nothing_moves() -> None:
    logprobs = torch.tensor([0.1, -0.1]).requires_grad_()
    result = clipped_loss(logprobs, torch.zeros(2), torch.tensor([1.0, -1.0]), torch.ones(2), 0.0)
    torch.autograd.backward(result.loss)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0, 0]
    assert result.clipped.all()


@pytest.mark.parametrize(
    ("grpo", "message"),
    [
        ({"group_size": 1}, "group_size must be 2 or more"),
        ({"rollout_batch": 8, "update_batch": 8}, "rollout_batch >= 2 x update_batch"),
        ({"rollout_batch": 8, "update_batch": 3}, "multiple of update_batch"),
        ({"clip": {"floor": 0.3}}, "floor <= epsilon"),
    ],
)
def test_settings_that_cannot_be(grpo: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"name": "r", "grpo": grpo})
