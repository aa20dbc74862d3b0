"""Truncated importance weights and the gap to the sampler, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from guardreasoner_vl.rl.importance import SamplerGap, importance_weights, sampler_gap

OLD = torch.tensor([0.2, 0.3, 0.4, 0.4]).log()
SAMPLED = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()


def test_weights_are_ratios_up_to_the_cap() -> None:
    """0.2 / 0.4, 0.3 / 0.3, 0.4 / 0.2, and 0.4 / 0.1 = 4, which is cut to 2."""
    assert importance_weights(OLD - SAMPLED, 2.0).tolist() == pytest.approx([0.5, 1.0, 2.0, 2.0])
    assert importance_weights(OLD - SAMPLED, 0.75).tolist() == pytest.approx([0.5, 0.75, 0.75, 0.75])


def test_the_gap_to_the_sampler() -> None:
    """|d| is log 2, 0, log 2, log 4; the ratios 0.5, 1, 2, 4 have the sum 7.5 and the sum of squares 21.25."""
    gap = sampler_gap(OLD - SAMPLED)
    assert gap.mean == pytest.approx(math.log(2))
    assert gap.p99 == pytest.approx(math.log(4))
    assert gap.effective == pytest.approx(7.5**2 / (4 * 21.25))


def test_one_percent_of_the_tokens_is_above_the_percentile() -> None:
    differences = torch.arange(1, 201) / 1000 * torch.tensor([1.0, -1.0]).repeat(100)
    assert sampler_gap(differences).p99 == pytest.approx(0.198)


def test_equal_log_probabilities_have_no_gap() -> None:
    assert sampler_gap(torch.zeros(5)) == SamplerGap(0.0, 0.0, 1.0)


def test_ratios_too_large_for_a_float_are_counted() -> None:
    """One token of a thousand that the sampler hardly ever draws makes the others worthless."""
    assert sampler_gap(torch.tensor([900.0, *[0.0] * 999])).effective == pytest.approx(0.001)
