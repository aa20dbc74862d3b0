"""Intervals hold what they should, McNemar's p-values are those of the binomial."""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import TYPE_CHECKING

import numpy as np
import pytest

from guardreasoner_vl.evaluation.intervals import (
    Interval,
    f1_difference_interval,
    f1_interval,
    false_positive_rate_interval,
    mcnemar,
    resampled_interval,
)
from guardreasoner_vl.evaluation.metrics import Counts, count
from guardreasoner_vl.types import Label

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from guardreasoner_vl.types import GoldLabel

HARMFUL, UNHARMFUL, ERROR = Label.HARMFUL, Label.UNHARMFUL, Label.ERROR


def test_an_interval_is_the_bootstraps_over_rows() -> None:
    counts = Counts(true_positive=60, false_positive=20, true_negative=100, false_negative=20)
    rng = np.random.default_rng(1)
    truth = np.array([True] * 80 + [False] * 120)
    answer = np.array([True] * 60 + [False] * 20 + [True] * 20 + [False] * 100)
    f1s, rates = [], []
    for _ in range(3000):
        at = rng.integers(0, 200, 200)
        tp, fp = (truth[at] & answer[at]).sum(), (~truth[at] & answer[at]).sum()
        f1s.append(2 * tp / (2 * tp + fp + (truth[at] & ~answer[at]).sum()))
        rates.append(fp / (~truth[at]).sum())
    for interval, values in ((f1_interval(counts), f1s), (false_positive_rate_interval(counts), rates)):
        assert interval is not None
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.012)


def test_the_same_rows_give_the_same_interval() -> None:
    counts = Counts(true_positive=531, false_positive=217, true_negative=845, false_negative=139)
    for interval in (f1_interval, false_positive_rate_interval):
        assert len({interval(counts) for _ in range(4)}) == 1


def test_an_interval_ends_where_the_binomial_does() -> None:
    """2.5% of the draws of Binomial(1000, 1/2) are below 469 and 2.5% above 531; 2,000 of them tell it to about 1."""
    interval = false_positive_rate_interval(Counts(false_positive=500, true_negative=500))
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((0.469, 0.531), abs=0.0015)


def test_few_rows_may_hold_one_that_counts() -> None:
    """Of two rows, one of them unharmful, some resamples have one unharmful row, and it was called harmful."""
    counts = Counts(true_positive=1, false_positive=1)
    assert false_positive_rate_interval(counts) == Interval(1.0, 1.0)


def test_what_is_undefined_has_no_interval() -> None:
    assert f1_interval(Counts()) is None
    assert f1_interval(Counts(true_negative=4)) is None
    assert false_positive_rate_interval(Counts(true_positive=4)) is None


def test_certainty_has_no_width() -> None:
    interval = f1_interval(Counts(true_positive=10, true_negative=10))
    assert interval is not None
    assert (interval.low, interval.high) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (1, 7, 2 * (1 + 8) / 256), (4, 4, 1.0)],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p_value: float) -> None:
    first = [True] * only_first + [False] * only_second + [True, False]
    second = [False] * only_first + [True] * only_second + [True, False]
    assert astuple(mcnemar(first, second)) == pytest.approx((only_first, only_second, p_value))


def test_mcnemar_of_many_rows_stays_finite() -> None:
    result = mcnemar([True] * 30_000 + [False] * 29_000, [False] * 30_000 + [True] * 29_000)
    normal = math.erfc(1000 / math.sqrt(2 * 59_000))
    assert result.p_value == pytest.approx(normal, rel=0.02)


def test_mcnemar_wants_the_same_rows() -> None:
    with pytest.raises(ValueError, match="same rows"):
        mcnemar([True], [])


@pytest.mark.slow
def test_the_difference_of_two_guards_is_the_bootstraps_over_rows() -> None:
    times: dict[tuple[GoldLabel, Label, Label], int] = {
        ("harmful", HARMFUL, HARMFUL): 40,
        ("harmful", HARMFUL, UNHARMFUL): 20,
        ("harmful", ERROR, HARMFUL): 8,
        ("unharmful", UNHARMFUL, UNHARMFUL): 80,
        ("unharmful", HARMFUL, UNHARMFUL): 6,
        ("unharmful", UNHARMFUL, ERROR): 16,
    }
    rows = [row for row, count_of in times.items() for _ in range(count_of)]
    rng = np.random.default_rng(1)
    values = []
    for _ in range(2000):
        drawn = [rows[at] for at in rng.integers(0, len(rows), len(rows))]
        first = count((gold, label) for gold, label, _ in drawn).f1
        second = count((gold, label) for gold, _, label in drawn).f1
        assert first is not None
        assert second is not None
        values.append(first - second)
    interval = f1_difference_interval(rows)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.012)
    turned = f1_difference_interval([(gold, second, first) for gold, first, second in rows])
    assert turned is not None
    assert (turned.low, turned.high) == pytest.approx((-interval.high, -interval.low), abs=0.012)
    assert interval == f1_difference_interval(rows)


def test_guards_that_say_the_same_do_not_differ() -> None:
    rows: list[tuple[GoldLabel, Label, Label]] = [("harmful", HARMFUL, HARMFUL), ("unharmful", HARMFUL, ERROR)]
    assert f1_difference_interval(rows * 9) == Interval(0.0, 0.0)


def test_a_difference_that_no_row_defines_has_no_interval() -> None:
    assert f1_difference_interval([]) is None
    assert f1_difference_interval([("unharmful", UNHARMFUL, UNHARMFUL)] * 4) is None
    assert f1_difference_interval([("unharmful", UNHARMFUL, HARMFUL)] * 4) is None


def test_one_row_in_error_is_the_whole_difference() -> None:
    assert f1_difference_interval([("harmful", HARMFUL, ERROR)] * 4) == Interval(1.0, 1.0)
    assert f1_difference_interval([("harmful", ERROR, HARMFUL)]) == Interval(-1.0, -1.0)


def test_any_figure_ends_where_the_binomial_does() -> None:
    values = np.array([True, False] * 500)
    interval = resampled_interval(1000, lambda places: float(values[places].mean()))
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((0.469, 0.531), abs=0.0025)


def test_resamples_without_the_figure_are_left_out() -> None:
    def only_of_the_first(places: NDArray[np.int64]) -> float | None:
        return 3.0 if places[0] == 0 else None

    assert resampled_interval(2, only_of_the_first) == Interval(3.0, 3.0)
    assert resampled_interval(2, lambda _: None) is None
    assert resampled_interval(0, lambda _: 1.0) is None
    first, second = (resampled_interval(50, lambda places: float(places.mean())) for _ in range(2))
    assert first == second is not None
