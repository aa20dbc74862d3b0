"""The rows of GRPO's log: how they are stored, what older logs may lack or have besides, and the best one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.recipe import parse_recipe
from guardreasoner_vl.training.grpo.log import LOG, Log, LogRow, Validation, draw_training, read_log

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = parse_recipe({"name": "toy", "tracker": []})
DIGESTS = {"model": "a", "rows": "b", "validation": "c"}
ROW = {
    "step": 1,
    "bound": 0.2,
    "reward": -0.5,
    "safety": 0.25,
    "accuracy": 0.5,
    "format": 1.0,
    "length": 0.75,
    "tokens": 12.5,
    "with_signal": 0.5,
    "clip_fraction": 0.0,
    "loss": 0.125,
    "gradient_norm": 2.0,
    "rollout_seconds": 1.234,
    "update_seconds": 0.5,
}
VALIDATION = {"f1": 0.5, "coverage": None, "tokens": 3.0}


def write(folder: Path, *rows: object) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / LOG).write_text(text)
    return text


def test_a_row_is_stored_as_it_is_read(tmp_path: Path) -> None:
    start = {"step": 0, "validation": VALIDATION, "begun_with": DIGESTS}
    text = write(tmp_path, start, ROW, {**ROW, "step": 2, "validation": VALIDATION})
    rows = read_log(tmp_path, 2)
    assert rows[0] == LogRow(step=0, validation=Validation(f1=0.5, tokens=3.0), begun_with=DIGESTS)
    assert (rows[1].tokens, rows[1].validation) == (12.5, None)
    (tmp_path / "again").mkdir()
    with Log(tmp_path / "again", 0, RECIPE) as log:
        for row in rows:
            log.append(row)
    assert (tmp_path / "again" / LOG).read_text() == text


@pytest.mark.slow
def test_older_rows_may_lack_fields_or_have_others(tmp_path: Path) -> None:
    write(tmp_path, {"step": 0, "seen": [1]}, {"step": 1, "reward": float("nan"), "validation": {"f1": 1, "old": 2}})
    start, trained = read_log(tmp_path, 1)
    assert start == LogRow(step=0)
    assert trained.reward != trained.reward  # it is not a number
    assert trained.validation == Validation(f1=1.0)
    assert draw_training(tmp_path, [start, trained]).read_text().startswith("<svg")


@pytest.mark.parametrize(
    "row", [[1], {}, {"step": "first"}, {"step": 1, "reward": "high"}, {"step": 1, "validation": {"tokens": 1.0}}]
)
def test_a_row_of_a_wrong_type_is_named_by_its_line(row: object, tmp_path: Path) -> None:
    write(tmp_path, {"step": 0}, row)
    with pytest.raises(DataError, match=r"log\.jsonl, line 2: not a row of the log; remove the line"):
        read_log(tmp_path, 2)


def test_the_best_row_is_the_first_with_the_highest_f1(tmp_path: Path) -> None:
    with Log(tmp_path, 0, RECIPE) as log:
        assert log.best is None
        for step, f1 in enumerate((0.25, None, 0.75, 0.75, 0.5)):
            log.append(LogRow(step=step, validation=None if f1 is None else Validation(f1=f1)))
        assert log.best is log.rows[2]
