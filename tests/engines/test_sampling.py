"""The choice of tokens: probabilities, nuclei by hand, seeds, bans, and the edges of floating point."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guardreasoner_vl.engines.qwen import QwenInputs
from guardreasoner_vl.engines.sampling import GenerationRow, Vocabulary, choose_tokens, nucleus, sample_tokens
from tests.engines.conformance import asked

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LAST = math.nextafter(1.0, 0.0)
"""The largest number that a generator gives."""


@pytest.fixture(scope="module")
def vocabulary(tiny_model: Path) -> Vocabulary:
    return Vocabulary(QwenInputs.from_folder(tiny_model))


def row(vocabulary: Vocabulary, prefix: str = "", **values: Any) -> GenerationRow:
    return GenerationRow(replace(asked(forced_prefix=prefix), **values), vocabulary, limit=50)


def draw(logits: torch.Tensor, uniforms: Sequence[float], temperature: float = 1.0, top_p: float = 1.0) -> list[int]:
    """One token for each uniform number, all from the same logits (vocabulary,)."""
    count = len(uniforms)
    drawn = sample_tokens(logits.repeat(count, 1), [temperature] * count, [top_p] * count, uniforms)
    return [int(token) for token in drawn]


def even(count: int) -> list[float]:
    """Numbers spread evenly over [0, 1)."""
    return [(at + 0.5) / count for at in range(count)]


def chi_square(tokens: Sequence[int], probabilities: torch.Tensor) -> float:
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    return float(((counts - expected) ** 2 / expected).sum())


class TestProbabilities:
    @pytest.mark.parametrize("temperature", [0.6, 1.0, 1.2, 3.0])
    def test_tokens_come_as_often_as_softmax_says(self, temperature: float) -> None:
        logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
        uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(4), dtype=torch.float64).tolist()
        statistic = chi_square(draw(logits, uniforms, temperature), torch.softmax(logits / temperature, -1))
        assert statistic < 37.4  # 0.9999 quantile for 11 degrees of freedom

    def test_even_numbers_give_the_probabilities_themselves(self) -> None:
        logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
        tokens = draw(logits, even(1000))
        assert [tokens.count(token) for token in range(4)] == [500, 100, 300, 100]
        assert tokens == sorted(tokens)

    def test_temperature_two_takes_the_square_roots(self) -> None:
        tokens = draw(torch.tensor([0.64, 0.04, 0.32 - 0.16, 0.16]).log(), even(900), temperature=2.0)
        assert [tokens.count(token) for token in range(4)] == [400, 100, 200, 200]  # as 0.8 : 0.2 : 0.4 : 0.4

    @pytest.mark.slow
    def test_neighbouring_seeds_are_independent(self, vocabulary: Vocabulary) -> None:
        """Rollouts of one prompt have neighbouring seeds: their first tokens must be independent."""
        logits = torch.full((5000, vocabulary.size), -1e9)
        logits[:, 300:304] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        rows = [row(vocabulary, temperature=1.0, seed=seed) for seed in range(5000)]
        tokens = [token - 300 for token in choose_tokens(logits, rows, vocabulary)]
        single = torch.tensor([0.4, 0.3, 0.2, 0.1])
        assert chi_square(tokens, single) < 21.2  # 0.9999 quantile for 3 degrees of freedom
        pairs = [4 * one + two for one, two in zip(tokens[::2], tokens[1::2], strict=True)]
        assert chi_square(pairs, torch.outer(single, single).flatten()) < 44.3  # for 15

    def test_steps_of_one_seed_are_independent(self, vocabulary: Vocabulary) -> None:
        sampled_row = row(vocabulary, temperature=1.0, seed=5)
        numbers = [sampled_row.uniform() for _ in range(4000)]
        cells = [4 * int(4 * a) + int(4 * b) for a, b in pairwise(numbers)]
        assert chi_square(cells, torch.full((16,), 1 / 16)) < 44.3
        assert all(0 <= number < 1 for number in numbers)


class TestNucleus:
    """By hand: 0.15, 0.5, 0.05 and 0.3 for tokens 0 to 3."""

    LOGITS = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()

    @pytest.mark.parametrize(
        ("top_p", "kept"),
        [(0.0, [1]), (1e-9, [1]), (0.45, [1]), (0.55, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (0.96, [0, 1, 2, 3])],
    )
    def test_the_smallest_set_that_reaches_the_mass(self, top_p: float, kept: list[int]) -> None:
        assert sorted(set(draw(self.LOGITS, [0.0, *even(400), LAST], top_p=top_p))) == kept

    def test_what_stays_is_scaled_up(self) -> None:
        tokens = draw(self.LOGITS, even(800), top_p=0.7)  # 0.5 and 0.3 of 0.8
        assert [tokens.count(token) for token in range(4)] == [0, 500, 0, 300]

    def test_temperature_comes_before_the_cut(self) -> None:
        assert set(draw(self.LOGITS, even(400), temperature=0.1, top_p=0.9)) == {1}  # 0.5^10 : 0.3^10 = 165 : 1

    def test_equally_likely_tokens_stay_in_their_order(self) -> None:
        assert set(draw(torch.zeros(4), even(400), top_p=0.6)) == {0, 1, 2}
        tied = torch.tensor([0.1, 0.2, 0.2, 0.3, 0.2]).log()
        assert set(draw(tied, even(400), top_p=0.6)) == {3, 1, 2}

    def test_a_flat_distribution_keeps_its_many_tokens(self) -> None:
        """More than the likeliest tokens that are tried before the sort."""
        tokens = draw(torch.zeros(1000), [0.0, *even(2000), LAST], top_p=0.9495)
        assert set(tokens) == set(range(950))

    def test_a_flat_neighbour_changes_nothing(self) -> None:
        """The flat row causes a sort; the order of equal values in other rows must not change."""
        generator = torch.Generator().manual_seed(1)
        logits = torch.randint(-8, 4, (40, 500), generator=generator).float()
        logits[:, :6] += 8.0
        uniforms = torch.rand(40, generator=generator, dtype=torch.float64).tolist()
        alone = [
            int(sample_tokens(values[None], [1.0], [0.97], [u])) for values, u in zip(logits, uniforms, strict=True)
        ]
        among = sample_tokens(torch.cat((logits, torch.zeros(1, 500))), [1.0] * 41, [0.97] * 41, [*uniforms, 0.5])
        assert among[:40].tolist() == alone

    @settings(deadline=None)
    @given(st.lists(st.sampled_from([*range(-40, 41, 5)]), min_size=1, max_size=150), st.floats(0.0, 1.0))
    def test_any_nucleus(self, tenths: list[int], top_p: float) -> None:
        probabilities = torch.softmax(torch.tensor(tenths) / 10, -1)
        cut = nucleus(probabilities[None], torch.tensor([[top_p]], dtype=torch.float64))[0]
        kept = [token for token, value in enumerate(cut.tolist()) if value]
        assert kept
        assert cut[kept].equal(probabilities[kept])
        mass, least = float(cut.sum()), float(probabilities[kept].min())
        assert mass > top_p - 1e-5
        assert len(kept) == 1 or mass - least < top_p + 1e-5
        dropped = sorted({*range(len(tenths))} - {*kept})
        assert all(tenths[token] <= min(tenths[other] for other in kept) for token in dropped)
        tied = [token for token in range(len(tenths)) if tenths[token] == min(tenths[other] for other in kept)]
        assert not set(tied[: sum(token in kept for token in tied)]) - {*kept}


class TestEdges:
    @pytest.mark.parametrize("top_p", [1.0, 0.999])
    @pytest.mark.parametrize("uniform", [0.0, 5e-324, 0.5, LAST, 1.0])
    def test_no_token_of_probability_zero(self, uniform: float, top_p: float) -> None:
        impossible = -torch.inf
        logits = torch.tensor([impossible, -200.0, 1.0, impossible, 0.0, impossible, -200.0, impossible])
        (token,) = draw(logits, [uniform], top_p=top_p)
        assert token in (2, 4)  # exp(-200) is zero in fp32

    @pytest.mark.slow
    @settings(deadline=None)
    @given(
        st.lists(st.sampled_from([-math.inf, -300.0, -2.5, 0.0, 0.125, 3.0, 88.0]), min_size=1, max_size=70),
        st.floats(0, 1),
        st.sampled_from([1e-40, 0.3, 1.0, 1.2, 50.0]),
        st.sampled_from([1e-6, 0.5, 0.95, 1.0]),
    )
    def test_whatever_the_logits(self, values: list[float], uniform: float, temperature: float, top_p: float) -> None:
        logits = torch.tensor([*values, 0.0])  # one at least is possible
        (token,) = draw(logits, [uniform], temperature, top_p)
        scale = max(temperature, 1e-37)
        assert float(torch.softmax((logits - logits.max()) / scale, -1)[token]) > 0

    def test_a_sum_under_one_loses_nothing(self) -> None:
        """151,936 equal tokens: in fp32 their sum is not 1, and a step less than the sum's last digit."""
        tokens = draw(torch.zeros(151_936), [0.0, 0.25, 0.5, LAST])
        assert tokens == [0, 37_984, 75_968, 151_935]

    def test_rare_tokens_are_not_lost_beside_a_certain_one(self) -> None:
        """2e-9 each: added to 1 they vanish in fp32."""
        assert draw(torch.tensor([0.0, -20.0, -20.0]), [0.5, 1 - 3e-9, 1 - 1e-9]) == [0, 1, 2]

    @pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
    def test_hardly_any_temperature_is_greedy(self, temperature: float) -> None:
        assert set(draw(torch.tensor([1e4, 1.0001e4, -1e4]), [0.0, 0.5, LAST], temperature)) == {1}


class TestRowsOfOneBatch:
    def test_each_row_has_its_own_settings(self, vocabulary: Vocabulary) -> None:
        logits = torch.randn(6, vocabulary.size, generator=torch.Generator().manual_seed(3))
        asked_for: list[dict[str, Any]] = [
            {"temperature": 1.2, "seed": 1},
            {"temperature": 0.0, "top_p": 0.5},
            {"temperature": 1.0, "seed": 2, "top_p": 0.4},
            {"temperature": 5.0, "seed": 3, "top_p": 0.95},
            {"temperature": 0.0, "seed": 4},
            {"temperature": 1.2, "seed": 1},
        ]
        together = choose_tokens(logits.clone(), [row(vocabulary, **values) for values in asked_for], vocabulary)
        alone = [
            choose_tokens(row_logits.clone()[None], [row(vocabulary, **values)], vocabulary)[0]
            for row_logits, values in zip(logits, asked_for, strict=True)
        ]
        assert together == alone
        assert (together[1], together[4]) == (int(logits[1].argmax()), int(logits[4].argmax()))
        assert len(set(together)) > 4

    def test_the_same_seed_and_logits_give_the_same_tokens(self, vocabulary: Vocabulary) -> None:
        logits = torch.randn(1, vocabulary.size, generator=torch.Generator().manual_seed(2)).repeat(3, 1)
        first, same, other = (row(vocabulary, temperature=1.0, seed=seed) for seed in (7, 7, 8))
        steps = [choose_tokens(logits.clone(), [first, same, other], vocabulary) for _ in range(20)]
        assert [step[0] for step in steps] == [step[1] for step in steps]
        assert [step[0] for step in steps] != [step[2] for step in steps]
        assert len({step[0] for step in steps}) > 10

    def test_without_a_seed_every_row_draws_anew(self, vocabulary: Vocabulary) -> None:
        first, again = (row(vocabulary, temperature=1.0, seed=None) for _ in range(2))
        assert first.uniform() != again.uniform()


class TestBans:
    def test_each_row_is_held_at_its_own_stage(self, vocabulary: Vocabulary) -> None:
        tag, brace = (vocabulary.tokenizer.token_to_id(text) for text in ("<", ">"))
        end = min(vocabulary.end_ids)
        logits = torch.zeros(5, vocabulary.size)
        logits[:, end], logits[:, tag], logits[:, brace] = 9.0, 8.0, 7.0
        rows = [
            row(vocabulary, ban_empty_think=True),
            row(vocabulary, "<think>", ban_empty_think=True),
            row(vocabulary, "<think>\n \n", ban_empty_think=True, temperature=0.1, seed=1),
            row(vocabulary, "<think>\nA kite", ban_empty_think=True),
            row(vocabulary, "<think>"),
        ]
        assert [held.think_state() for held in rows] == [
            "before think",
            "before reasoning",
            "before reasoning",
            None,
            None,
        ]
        assert choose_tokens(logits, rows, vocabulary) == [end, brace, brace, end, end]

    def test_reasoning_that_was_written_lifts_the_ban(self, vocabulary: Vocabulary) -> None:
        started = row(vocabulary, "<think>", ban_empty_think=True)
        assert started.think_state() == "before reasoning"
        (kite, *_) = vocabulary.tokenizer.encode(" kite", add_special_tokens=False).ids
        started.add(kite)
        assert started.think_state() is None

    @pytest.mark.parametrize("temperature", [0.0, 2.0])
    def test_placeholders_and_padding_are_never_chosen(self, temperature: float, vocabulary: Vocabulary) -> None:
        logits = torch.zeros(50, vocabulary.size + 30)
        logits[:, vocabulary.never] = 50.0
        logits[:, vocabulary.size :] = 60.0
        rows = [row(vocabulary, temperature=temperature, seed=seed) for seed in range(50)]
        for token in choose_tokens(logits, rows, vocabulary):
            assert token < vocabulary.size
            assert token not in vocabulary.never
