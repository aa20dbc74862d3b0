"""Ranking and calibration figures by hand, and beside scikit-learn's on random rows."""

from __future__ import annotations

from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from guardreasoner_vl.evaluation.curves import (
    auprc,
    auroc,
    calibration_error,
    curve,
    recall_at,
    reliability,
)

TRUTHS = [True, True, False, True, False]
SCORES = [0.9, 0.8, 0.7, 0.6, 0.1]
ROWS = st.lists(st.tuples(st.booleans(), st.integers(0, 20).map(lambda n: n / 20)), min_size=1, max_size=60)


def test_by_hand() -> None:
    assert auroc(TRUTHS, SCORES) == pytest.approx(5 / 6)  # of 6 pairs one is the wrong way round
    assert auprc(TRUTHS, SCORES) == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert recall_at(TRUTHS, SCORES, 0.0) == pytest.approx(2 / 3)
    assert recall_at(TRUTHS, SCORES, 0.5) == 1.0
    assert astuple(curve(TRUTHS, SCORES)[2]) == pytest.approx((0.7, 2 / 3, 0.5, 4 / 6))


def test_ties_count_half_and_fall_together() -> None:
    assert auroc([True, False], [0.5, 0.5]) == 0.5
    assert auprc([True, False, False], [0.5, 0.5, 0.5]) == pytest.approx(1 / 3)
    assert recall_at([True, False], [0.5, 0.5], 0.0) == 0.0
    assert len(curve([True, False, True], [0.5, 0.5, 0.2])) == 2


def test_calibration_by_hand() -> None:
    truths, scores = [True, False, True, True], [0.15, 0.15, 0.95, 1.0]
    assert [astuple(one) for one in reliability(truths, scores)] == [
        pytest.approx((2, 0.15, 0.5)),
        pytest.approx((2, 0.975, 1.0)),
    ]
    assert calibration_error(truths, scores) == pytest.approx(0.5 * 0.35 + 0.5 * 0.025)


@pytest.mark.parametrize("truths", [[], [True, True], [False]])
def test_one_class_ranks_nothing(truths: list[bool]) -> None:
    scores = [0.5] * len(truths)
    assert auroc(truths, scores) is None
    assert auprc(truths, scores) is None
    assert recall_at(truths, scores, 0.01) is None
    assert curve(truths, scores) == []


def test_nothing_to_calibrate() -> None:
    assert calibration_error([], []) is None


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="as many scores"):
        auroc([True], [0.1, 0.2])


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(ROWS)
def test_as_scikit_learn(rows: list[tuple[bool, float]]) -> None:
    truths, scores = [truth for truth, _ in rows], [score for _, score in rows]
    if len(set(truths)) == 2:
        assert auroc(truths, scores) == pytest.approx(roc_auc_score(truths, scores))
        assert auprc(truths, scores) == pytest.approx(average_precision_score(truths, scores))
