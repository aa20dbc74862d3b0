"""Evaluations beside each other."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.compare import by_group, comparison_markdown, difference, leaderboard, read_evaluation
from guardreasoner_vl.evaluation.predictions import PREDICTIONS, RESULTS, SETTINGS
from guardreasoner_vl.evaluation.results import Settings, summarise
from guardreasoner_vl.types import Label
from tests.builders import prediction

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.evaluation.compare import Evaluation

LABELS = {"good": "hhhhhh", "bad": "uuuuhh"}


def evaluation(folder: Path, name: str, count: int = 6) -> Evaluation:
    folder = folder / name
    folder.mkdir()
    words = {"h": "harmful", "u": "unharmful"}
    rows = [prediction(str(at), "harmful", words[LABELS[name][at]]) for at in range(count)]
    (folder / PREDICTIONS).write_text("".join(row.model_dump_json() + "\n" for row in rows))
    (folder / SETTINGS).write_text(json.dumps(asdict(Settings(name, None, "fast"))))
    return read_evaluation(folder)


def test_the_best_is_listed_first_and_the_test_is_exact(tmp_path: Path) -> None:
    bad, good = evaluation(tmp_path, "bad"), evaluation(tmp_path, "good")
    board = leaderboard([bad, good], "request")
    assert [line[0] for line in board[1:]] == ["good, fast (good)", "bad, fast (bad)"]
    assert [line[1] for line in board[1:]] == ["100.0", "50.0"]
    rows, test = difference(good, bad, "request")
    assert (rows, test.only_first, test.only_second) == (6, 4, 0)
    assert test.p_value == pytest.approx(2 / 16)
    assert "| bad, fast (bad) |  | 6 | 4 | 0 | 0.12 |" in comparison_markdown([good, bad])


def test_only_shared_rows_are_compared(tmp_path: Path) -> None:
    rows, test = difference(evaluation(tmp_path, "good"), evaluation(tmp_path, "bad", count=3), "request")
    assert (rows, test.only_first) == (3, 3)


def test_benchmarks_set_apart_and_baselines_stand_beside_every_guard(tmp_path: Path) -> None:
    rows = [prediction("a", "harmful", "harmful"), prediction("b", "unharmful", "harmful", benchmark="noisy")]
    for name, part in (("both", rows), ("one", rows[:1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / PREDICTIONS).write_text("".join(row.model_dump_json() + "\n" for row in part))
        (tmp_path / name / SETTINGS).write_text(json.dumps(asdict(Settings(name, None, "fast"))))
    results = summarise(rows, Settings("both", None, "fast"), {"no": lambda row, target: Label.UNHARMFUL}, ["noisy"])
    (tmp_path / "both" / RESULTS).write_text(json.dumps(results.as_json()))
    both, single = read_evaluation(tmp_path / "both"), read_evaluation(tmp_path / "one")
    assert both.results.groups["request"]["all"].figures.rows == 1
    dash = "\u2013"
    assert by_group([both, single], "request") == [
        ["", "rows", "harmful", "both, fast (both) F1 / FPR", "one, fast (one) F1 / FPR", "no F1 / FPR", "coverage"],
        ["all", "1", "1", f"100.0 / {dash}", f"100.0 / {dash}", f"0.0 / {dash}", "100.0 / 100.0"],
        ["toy", "1", "1", f"100.0 / {dash}", f"100.0 / {dash}", f"0.0 / {dash}", "100.0 / 100.0"],
        ["noisy (excluded)", "1", "0", "0.0 / 100.0", dash, f"{dash} / 0.0", f"100.0 / {dash}"],
        ["modality: text", "1", "1", f"100.0 / {dash}", f"100.0 / {dash}", f"0.0 / {dash}", "100.0 / 100.0"],
    ]
    assert "| noisy (excluded) | 1 | 0 |" in comparison_markdown([both, single])
    assert difference(both, both, "request")[0] == 1


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no evaluation in it"):
        read_evaluation(tmp_path)
