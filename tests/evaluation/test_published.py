"""The paper's tables as shipped: complete, and their averages are the sample-weighted ones."""

from __future__ import annotations

import pytest

from guardreasoner_vl.evaluation.published import AVERAGES, Task, averages, published_f1, sizes

OURS = ("GuardReasoner-VL 3B", "GuardReasoner-VL 7B", "GuardReasoner-VL-Eco 3B", "GuardReasoner-VL-Eco 7B")
TASKS: tuple[Task, Task] = ("prompt", "response")


def test_there_are_fourteen_benchmarks() -> None:
    assert len(sizes()) == 14
    assert [sum(size.task == task for size in sizes()) for task in TASKS] == [8, 6]


@pytest.mark.parametrize("task", TASKS)
def test_published_averages_follow_from_the_published_cells(task: Task) -> None:
    compared = 0
    for model, cells in published_f1(task).items():
        for name, value in averages(task, cells).items():
            if value is not None and cells.get(name) is not None:
                assert value == pytest.approx(cells[name], abs=0.05), (model, name)
                compared += 1
    assert compared > 30


@pytest.mark.parametrize("task", TASKS)
def test_the_papers_guards_are_complete(task: Task) -> None:
    names = {size.benchmark for size in sizes() if size.task == task}
    for model in OURS:
        cells = published_f1(task)[model]
        assert set(cells) == names | set(AVERAGES)
        assert all(value is not None for value in cells.values())


def test_an_average_wants_all_its_benchmarks() -> None:
    cells = {size.benchmark: 50.0 for size in sizes() if size.task == "prompt"}
    assert averages("prompt", cells) == {"Average (Text)": 50.0, "Average (All)": 50.0}
    assert averages("prompt", {**cells, "HarmImageTest": None}) == {"Average (Text)": 50.0, "Average (All)": None}
    del cells["ToxicChat"]
    assert averages("prompt", cells) == {"Average (Text)": None, "Average (All)": None}
