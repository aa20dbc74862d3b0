"""The class of a row, by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.sources.union import class_of
from guardreasoner_vl.types import Sample

if TYPE_CHECKING:
    from guardreasoner_vl.types import GoldLabel

H: GoldLabel = "harmful"
U: GoldLabel = "unharmful"


@pytest.mark.parametrize(
    ("request_label", "response_label", "expected"),
    [
        (H, H, H),
        (H, U, H),
        (H, None, H),
        (U, H, H),
        (U, U, U),
        (U, None, U),
        (None, H, H),
        (None, U, U),
        (None, None, None),
    ],
)
def test_a_row_is_harmful_if_a_label_is(
    request_label: GoldLabel | None, response_label: GoldLabel | None, expected: GoldLabel | None
) -> None:
    row = Sample(
        id="a",
        source="toy",
        modality="text",
        prompt="Bread?",
        response="With flour.",
        request_label=request_label,
        response_label=response_label,
    )
    assert class_of(row) == expected


@pytest.mark.parametrize("label", [H, U, None])
def test_the_only_part_of_a_row_decides(label: GoldLabel | None) -> None:
    asked = Sample(id="a", source="toy", modality="text", prompt="Bread?", request_label=label)
    answered = Sample(id="b", source="toy", modality="text", prompt=" ", response="Flour.", response_label=label)
    assert (class_of(asked), class_of(answered)) == (label, label)


def test_a_label_of_an_absent_part_has_no_say() -> None:
    assert class_of(Sample(id="a", source="toy", modality="text", prompt="Bread?", response_label=H)) is None
