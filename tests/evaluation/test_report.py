"""Predictions to figures to a report, with numbers computed by hand."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.evaluation.figures import draw_results
from guardreasoner_vl.evaluation.published import published_f1, published_tokens, sizes
from guardreasoner_vl.evaluation.report import NONE, markdown_table, page, paper_f1, paper_table, report_markdown
from guardreasoner_vl.evaluation.results import Results, Settings, summarise
from guardreasoner_vl.types import Judgement, Label
from tests.builders import prediction

if TYPE_CHECKING:
    from guardreasoner_vl.evaluation.predictions import Prediction

SETTINGS = Settings("toy", "r1", "fast")
NOT_ASKED = Judgement(label=Label.NOT_APPLICABLE)


@pytest.fixture
def rows() -> list[Prediction]:
    return [
        prediction("a", "harmful", "harmful", 0.9, completion_tokens=10, seconds=0.5, category="fraud"),
        prediction("b", "harmful", "unharmful", 0.2, completion_tokens=20, seconds=0.5, category="fraud"),
        prediction("c", "unharmful", "harmful", 0.6, completion_tokens=30, modality="image"),
        prediction("d", "unharmful", "unharmful", 0.1, completion_tokens=40, modality="image"),
        prediction("e", "unharmful", "error", None, completion_tokens=0, benchmark="other"),
        prediction("f", None, "harmful", 0.9, benchmark="other"),
    ]


@pytest.fixture
def results(rows: list[Prediction]) -> Results:
    return summarise(rows, SETTINGS)


def test_all_rows_by_hand(results: Results) -> None:
    assert list(results.groups["request"]) == [
        "all", "toy", "other", "modality: text", "modality: image", "category: fraud"
    ]  # fmt: skip
    assert results.groups["response"] == {}
    everything = results.as_json()["groups"]["request"]["all"]["figures"]
    assert everything["counts"] == {
        "true_positive": 1, "false_positive": 2, "true_negative": 1, "false_negative": 1, "errors": 1
    }  # fmt: skip
    assert everything["f1"] == pytest.approx(2 / 5)
    assert everything["false_positive_rate"] == pytest.approx(2 / 3)
    assert everything["coverage"] == pytest.approx(4 / 5)
    assert everything["scored"] == 4
    assert everything["auroc"] == pytest.approx(3 / 4)  # 0.9 > 0.6, 0.1; 0.2 > 0.1 only
    assert everything["completion_tokens_mean"] == 20
    assert everything["seconds"] == 1.0


def test_the_constant_guards_stand_beside(results: Results) -> None:
    baselines = results.groups["request"]["toy"].baselines
    assert baselines["always harmful"].f1 == pytest.approx(2 / 3)
    assert baselines["always harmful"].false_positive_rate == 1
    assert baselines["always unharmful"].recall == 0


def test_markdown_says_what_was_measured(results: Results) -> None:
    results.warnings.append("toy: 4 rows, but the official set has 5")
    results.skipped["toy"] = {"no label": 2}
    text = report_markdown(results, "guardreasoner-vl evaluate", ["request_f1.svg"])
    for part in ("# toy (r1), fast mode", "official set has 5", "no label 2", "![request f1](request_f1.svg)"):
        assert part in text
    line = next(line for line in text.splitlines() if line.startswith("| other |"))
    assert line.startswith("| other | 1 | 0 | 0.0 (0.0\u20130.0) | 0.0 | \u2013 | 100.0")
    assert "| 0.0 |" in line  # coverage
    assert "Responses" not in text


def test_a_bar_in_a_cell_does_not_break_the_table() -> None:
    assert markdown_table([["a", "b"], ["x|y", "z"]]) == "| a | b |\n|---|---|\n| x\\|y | z |"


def test_html_is_one_page_and_escapes_what_it_shows(rows: list[Prediction]) -> None:
    results = summarise([rows[0].model_copy(update={"category": "<script>alert(1)</script>"}), *rows[1:]], SETTINGS)
    text = page(results, "guardreasoner-vl evaluate", {"request_f1": "<svg></svg>"})
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "<figure><svg></svg>" in text
    assert "http" not in text.replace("http://www.w3.org", "")


def test_the_papers_cells_stand_beside_ours() -> None:
    rows = [
        prediction(f"{name}-{number}", "harmful", "harmful" if number else "unharmful", benchmark=name)
        for name in ("ToxicChat", "HarmBenchPrompt")
        for number in range(2)
    ]
    results = summarise(rows, SETTINGS)
    measured = paper_f1(results, "request")
    assert measured == {
        "ToxicChat": pytest.approx(200 / 3),
        "HarmBenchPrompt": pytest.approx(200 / 3),
        "Average (Text)": None,
        "Average (All)": None,
    }
    table = paper_table(results, "request")
    assert table[-1] == ["**toy, fast**", "66.67", "66.67", NONE, NONE]
    theirs = published_f1("prompt")["GuardReasoner-VL 7B"]
    cells = next(row for row in table if row[0] == "GuardReasoner-VL 7B")
    assert cells[1] == f"{theirs['ToxicChat']:.2f}"
    assert paper_table(results, "response") == []


@pytest.mark.slow
def test_the_papers_tokens_stand_beside_an_evaluation_of_all_its_benchmarks() -> None:
    rows = [
        prediction(f"{size.file}-{label}", label, label, benchmark=size.file, completion_tokens=50)
        for size in sizes()
        if size.task == "prompt"
        for label in ("harmful", "unharmful")
    ]
    theirs = {"GuardReasoner-VL 3B", "GuardReasoner-VL-Eco 3B", "GuardReasoner-VL 7B", "GuardReasoner-VL-Eco 7B"}
    assert set(published_tokens()) == theirs
    whole = summarise(rows, SETTINGS)
    svg = draw_results(whole, rows)["request_tokens"]
    shown = {name for name in {*theirs, "toy, Average (All)"} if f"<!-- {name} -->" in svg}
    assert shown == {*theirs, "toy, Average (All)"}
    part = draw_results(summarise(rows[2:], SETTINGS), rows[2:])["request_tokens"]
    assert "GuardReasoner-VL" not in part


@pytest.mark.slow
def test_figures_are_drawn_for_what_is_defined(rows: list[Prediction], results: Results) -> None:
    figures = draw_results(results, rows)
    assert set(figures) == {
        "request_f1", "request_tokens", "request_modality", "request_reliability", "request_threshold"
    }  # fmt: skip
    for svg in figures.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert set(draw_results(summarise(rows[:1], SETTINGS), rows[:1])) == {"request_f1", "request_tokens"}
    assert draw_results(summarise(rows[4:5], SETTINGS), rows[4:5]) == {}  # nothing harmful: no F1
