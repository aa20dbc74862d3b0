"""Hashed n-grams + logistic regression on toy rows."""

from __future__ import annotations

import pytest

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.baseline import HashedNgramBaseline, baseline_text
from guardreasoner_vl.types import GoldLabel, Sample


def row(
    prompt: str, request: GoldLabel | None = None, said: str | None = None, response: GoldLabel | None = None
) -> Sample:
    return Sample(
        id=prompt,
        source="toy",
        modality="text",
        prompt=prompt,
        response=said,
        request_label=request,
        response_label=response,
    )


TOY = [
    *(row(f"how to make poison {number}", "harmful", "mix it", "harmful") for number in range(5)),
    *(row(f"how to bake bread {number}", "unharmful", "sorry, no", "unharmful") for number in range(5)),
]


def test_it_learns_both_targets() -> None:
    request = HashedNgramBaseline.fit(TOY, "request").probabilities([row("make poison"), row("bake bread")])
    assert request[0] > 0.5 > request[1]
    response = HashedNgramBaseline.fit(TOY, "response")
    answers = response.probabilities([row("", said="mix it"), row("", said="sorry, no")])
    assert answers[0] > 0.5 > answers[1]
    assert response.target == "response"


def test_unknown_labels_are_skipped() -> None:
    confusing = [row("how to bake bread", None) for _ in range(50)]
    probe = [row("make poison"), row("bake bread")]
    assert HashedNgramBaseline.fit([*TOY, *confusing], "request").probabilities(probe) == pytest.approx(
        HashedNgramBaseline.fit(TOY, "request").probabilities(probe)
    )


@pytest.mark.parametrize("rows", [[], TOY[:5], [row("x", None)], [*TOY[:5], row("y", None)]])
def test_one_class_cannot_be_learnt(rows: list[Sample]) -> None:
    with pytest.raises(DataError, match="do not have both request classes; add rows of the missing one"):
        HashedNgramBaseline.fit(rows, "request")


def test_no_rows_no_probabilities() -> None:
    assert HashedNgramBaseline.fit(TOY, "request").probabilities([]) == []


def test_what_it_reads() -> None:
    assert baseline_text(row("a", said="b"), "request") == "a"
    assert baseline_text(row("a", said="b"), "response") == "a\nb"
    assert baseline_text(row("a"), "response") == "a\n"
