"""Hand-computed confusion tables and their figures."""

import pytest

from guardreasoner_vl.evaluation.metrics import Counts, count
from guardreasoner_vl.types import GoldLabel, Label

H, U, E, N = Label.HARMFUL, Label.UNHARMFUL, Label.ERROR, Label.NOT_APPLICABLE


def rows(truth: GoldLabel, answer: Label, times: int) -> list[tuple[GoldLabel, Label]]:
    return [(truth, answer)] * times


def test_every_cell_is_counted_once() -> None:
    pairs = rows("harmful", H, 3) + rows("harmful", U, 2) + rows("unharmful", H, 1) + rows("unharmful", U, 4)
    assert count(pairs) == Counts(true_positive=3, false_positive=1, true_negative=4, false_negative=2, errors=0)


def test_figures_by_hand() -> None:
    counts = Counts(true_positive=3, false_positive=1, true_negative=4, false_negative=2)
    assert counts.precision == pytest.approx(3 / 4)
    assert counts.recall == pytest.approx(3 / 5)
    assert counts.f1 == pytest.approx(6 / 9)
    assert counts.false_positive_rate == pytest.approx(1 / 5)
    assert counts.accuracy == pytest.approx(7 / 10)
    assert counts.coverage == 1.0


@pytest.mark.parametrize("answer", [E, N])
def test_an_answer_without_a_label_is_wrong_once_whatever_the_truth(answer: Label) -> None:
    counts = count([("harmful", answer), ("unharmful", answer), ("harmful", H), ("unharmful", U)])
    assert counts == Counts(true_positive=1, false_positive=1, true_negative=1, false_negative=1, errors=2)
    assert counts.coverage == 0.5
    assert counts.f1 == pytest.approx(2 / 4)


def test_undefined_figures_are_none_and_not_zero() -> None:
    assert count([]).f1 is None
    assert count([]).coverage is None
    only_unharmful = count([("unharmful", U)])
    assert only_unharmful.f1 is None
    assert only_unharmful.recall is None
    assert only_unharmful.false_positive_rate == 0.0
    assert count([("harmful", H)]).false_positive_rate is None
