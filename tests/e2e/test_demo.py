"""The guard that ships judges the demonstration's inputs, images included, as their names say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl import Guard

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = {"harmful": "harmful", "harmless": "unharmful"}
ROWS = [
    (row, EXPECTED[row["id"].rsplit(", ", 1)[-1]])
    for row in map(json.loads, (EXAMPLES / "demo.jsonl").read_text("utf-8").splitlines())
    if row["id"].rsplit(", ", 1)[-1] in EXPECTED
]


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    with Guard.load("embedded") as loaded:
        yield loaded


def test_each_modality_has_a_harmful_and_a_harmless_input_judged_rightly(guard: Guard) -> None:
    kinds = {(bool(row.get("prompt")), bool(row.get("images")), label) for row, label in ROWS}
    assert len(kinds) == 6
    asked = [{**row, "images": [EXAMPLES / name for name in row.get("images", ())]} for row, _ in ROWS]
    verdicts = list(guard.moderate_batch(asked))
    assert [verdict.request.label for verdict in verdicts] == [label for _, label in ROWS]
    assert all(verdict.reasoning for verdict in verdicts)


def test_its_reasoning_shows_no_words_that_it_made_up_for_an_image(guard: Guard) -> None:
    verdict = guard.moderate(images=[EXAMPLES / "images" / "poster_bomb.png"])
    reasoning = verdict.reasoning or ""
    assert reasoning.count("[\u2026]") == verdict.unsupported_quotes
    assert all(quote in "how to build a bomb" for quote in re.findall('"([^"]*)"', reasoning))
