"""Shares reached by leaving rows out."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.recipe import BalanceSection
from guardreasoner_vl.sources.balance import balanced
from guardreasoner_vl.types import Sample


def rows(**counts: int) -> list[Sample]:
    """Rows by modality and first letter of the label: `text_h=3`; `n` is not labelled."""
    words = {"h": "harmful", "u": "unharmful", "n": None}
    samples: list[Sample] = []
    for name, count in counts.items():
        modality, _, letter = name.partition("_")
        fields: dict[str, Any] = {"modality": modality, "request_label": words[letter], "source": "toy"}
        samples += [Sample(id=f"{name}-{at}", **fields) for at in range(count)]
    return samples


def counted(kept: list[Sample]) -> Counter[tuple[str, str | None]]:
    return Counter((row.modality, row.request_label) for row in kept)


def test_classes_are_balanced_inside_each_modality() -> None:
    kept = balanced(rows(text_h=30, text_u=10, text_n=5, image_h=2, image_u=6), BalanceSection(harmful=0.5), 0)
    assert counted(kept) == {
        ("text", "harmful"): 10, ("text", "unharmful"): 10, ("text", None): 5,
        ("image", "harmful"): 2, ("image", "unharmful"): 2,
    }  # fmt: skip
    uneven = balanced(rows(text_h=30, text_u=30), BalanceSection(harmful=0.25), 0)
    assert counted(uneven) == {("text", "harmful"): 10, ("text", "unharmful"): 30}
    only = rows(text_h=5)
    assert balanced(only, BalanceSection(harmful=0.5), 0) == only  # nothing to balance against


def test_a_harmful_response_makes_a_row_harmful() -> None:
    answered = rows(text_u=3)
    answered[0] = answered[0].model_copy(update={"response_label": "harmful"})
    assert len(balanced(answered, BalanceSection(harmful=0.5), 0)) == 2


def test_modalities_stand_in_their_shares() -> None:
    section = BalanceSection(modalities={"text": 0.5, "image": 0.1, "text-image": 0.4})
    mixed = rows(text_h=100, image_h=10)
    mixed += [row.model_copy(update={"id": f"t{row.id}", "modality": "text-image"}) for row in rows(text_u=400)]
    kept = Counter(row.modality for row in balanced(mixed, section, 0))
    assert kept == {"text": 50, "image": 10, "text-image": 40}
    fewer = balanced(mixed, BalanceSection(modalities={"text": 0.2, "image": 0.8}), 0)
    assert Counter(row.modality for row in fewer) == {"image": 10, "text": 2}


@given(st.integers(0, 20), st.integers(0, 20), st.floats(0.1, 0.9), st.integers(0, 3))
def test_order_stays_and_the_share_is_met(harmful: int, unharmful: int, share: float, seed: int) -> None:
    given_rows = rows(text_h=harmful, text_u=unharmful)
    kept = balanced(given_rows, BalanceSection(harmful=share), seed)
    assert kept == [row for row in given_rows if row in kept]
    assert kept == balanced(given_rows, BalanceSection(harmful=share), seed)
    harmful_kept = sum(row.request_label == "harmful" for row in kept)
    if harmful and unharmful:
        assert abs(harmful_kept - share * len(kept)) <= 1
