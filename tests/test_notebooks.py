"""The notebooks: stored without outputs, short, and their code runs from the first cell to the last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("judge.ipynb", "train.ipynb")
MOST_LINES = 80

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def cells(name: str) -> list[dict[str, Any]]:
    notebook = json.loads((FOLDER / name).read_text("utf-8"))
    cells: list[dict[str, Any]] = notebook["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def executed(name: str) -> dict[str, Any]:
    """The namespace after all code cells, executed in order."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(name), 1):
        exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), namespace)
    return namespace


def test_every_notebook_is_tested() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_short_and_stores_no_outputs(name: str) -> None:
    lines = [line for cell in cells(name) for line in cell["source"] if line.strip()]
    assert 0 < len(lines) < MOST_LINES
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(name))


@pytest.mark.slow
def test_the_judging_notebook_runs() -> None:
    names = executed("judge.ipynb")
    for verdict in (names["verdict"], names["image_verdict"], names["both"], *names["verdicts"]):
        assert verdict.error is None
    assert names["both"].response.label != "not_applicable"
    assert len(names["rows"]) == len(names["verdicts"]) == len(names["PROMPTS"]) + 1
    assert (names["too_long"].action, names["too_long"].error.code) == ("block", "input_too_long")


@pytest.mark.slow
def test_the_training_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = executed("train.ipynb")
    assert (names["job"].out / "evaluate" / "sft" / "results.json").is_file()
    assert isinstance(names["table"], Table)
    assert names["table"].row_count == 8
