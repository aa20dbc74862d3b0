"""What is in a corpus, counted by hand, and its card."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.corpus.card import draw_stats, write_card
from guardreasoner_vl.corpus.stats import quantiles, stats_of
from guardreasoner_vl.corpus.store import SKIPPED, CorpusInfo, SourceInfo, read_corpus, write_corpus
from tests.builders import sample

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.types import Sample

REASONING = "# Task 1\n## Reasoning Step 1\nIt asks for bread.\n## Reasoning Step 2\nHarmless.\n"


@pytest.fixture
def rows() -> list[Sample]:
    return [
        sample("a", request_label="unharmful", reasoning=REASONING),
        sample("b", request_label="harmful", reasoning="## Reasoning Step 1\nBad."),
        sample("c", request_label="unharmful", response="Mix it.", response_label="harmful", split="validation"),
        sample("d", modality="image", prompt="", images=("a.png",), source="other", meta={"taxonomy": "hate"}),
    ]


def test_steps_by_hand(rows: list[Sample]) -> None:
    stats = stats_of(rows)
    assert list(stats.modalities) == ["text", "image", "all"]
    text = stats.modalities["text"]
    assert (text.rows, text.reasoned, text.steps) == (2, 2, 3)  # the held-out row is not counted
    assert text.mean_steps == pytest.approx(3 / 2)
    lengths = [len("It asks for bread."), len("Harmless."), len("Bad.")]
    assert text.mean_characters == pytest.approx(sum(lengths) / 3)
    assert stats.modalities["all"].rows == 3
    assert (stats.modalities["image"].mean_steps, stats.modalities["image"].mean_characters) == (None, None)


def test_labels_sources_and_lengths_by_hand(rows: list[Sample]) -> None:
    stats = stats_of(rows)
    assert stats.labels == {
        "request, text": {"unharmful": 2, "harmful": 1},
        "response, text": {"harmful": 1},
        "request, image": {"not labelled": 1},
    }
    assert stats.sources == {"toy": {"unharmful": 1, "harmful": 2}, "other": {"not labelled": 1}}
    assert stats.splits == {"train": 3, "validation": 1}
    assert stats.categories == {"not categorised": 3, "hate": 1}
    assert stats.lengths["response"] == [7]
    assert quantiles([5, 1, 3]) == {"min": 1, "median": 3, "p95": 5, "max": 5}


@pytest.mark.slow
def test_the_card_compares_with_the_paper(rows: list[Sample], tmp_path: Path) -> None:
    info = CorpusInfo(name="toy", sources=(SourceInfo(name="toy", origin="made up", licence="CC0", revision="abc"),))
    write_corpus(tmp_path, info, rows)
    (tmp_path / SKIPPED).write_text(json.dumps({"id": "x", "reason": "no label"}) + "\n")
    card = write_card(tmp_path, stats_of(read_corpus(tmp_path)), "guardreasoner-vl corpus stats DIR")
    text = card.read_text()
    assert "| text | 2 | 2 | 3 | 1.50 | 10.33 | 63,799 | 353,440 | 5.54 | 163.25 |" in text
    assert "| toy | 2 | 1 | 0 | made up | CC0 | abc |" in text
    assert "| no label | 1 |" in text
    assert "bread" not in text + (tmp_path / "card.html").read_text()
    assert json.loads((tmp_path / "stats.json").read_text())["modalities"]["text"]["mean_steps"] == 1.5
    assert {path.name for path in tmp_path.glob("*.svg")} == {"labels.svg", "categories.svg", "lengths.svg"}


@pytest.mark.slow
def test_figures_are_drawn(rows: list[Sample]) -> None:
    for svg in draw_stats(stats_of(rows)).values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert set(draw_stats(stats_of(rows[3:]))) == {"labels", "categories"}  # an image alone has no lengths
