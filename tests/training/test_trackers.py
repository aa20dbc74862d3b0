"""Learning curves: at every tracker each step once, whatever ended the process before."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

import accelerate
import accelerate.tracking
import pytest

from guardreasoner_vl.errors import RecipeError, TrackerError
from guardreasoner_vl.pipeline.run import Run
from guardreasoner_vl.pipeline.run import run as run_pipeline
from guardreasoner_vl.recipe import Recipe, parse_recipe
from guardreasoner_vl.training.trackers import LearningCurves, check_installed
from tests.smoke import short_recipe
from tests.training.fake_trackers import NAMES, FakeRun, FakeServer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS", "MLFLOW_NESTED_RUN"):
        monkeypatch.delenv(name, raising=False)
    accelerate.PartialState(cpu=True)  # the stages have it; accelerate's logger needs it
    return FakeServer(monkeypatch)


def recipe(*trackers: str) -> Recipe:
    return parse_recipe({"name": "toy", "seed": 7, "grpo": {"group_size": 4}, "tracker": list(trackers)})


def reported(curves: LearningCurves, *steps: int, reward: float = 0.5) -> None:
    for step in steps:
        curves.log({"step": step, "reward": reward, "digest": "abc", "validation": {"f1": 0.25, "none": None}}, step)


def only_run(server: FakeServer) -> FakeRun:
    (run,) = server.runs.values()
    return run


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")  # has no types
    events = module.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_continues_the_run_and_repeats_no_step(name: str, server: FakeServer, tmp_path: Path) -> None:
    with LearningCurves(recipe(name), "grpo", tmp_path, 0) as curves:
        reported(curves, 0, 1, 2)
    again = LearningCurves(recipe(name), "grpo", tmp_path, 2)  # killed: it is never closed
    reported(again, 2, 3)
    with LearningCurves(recipe(name), "grpo", tmp_path, 2) as curves:
        reported(curves, 2, 3, 4)
    run = only_run(server)
    assert run.points == [(step, {"reward": 0.5, "validation/f1": 0.25}) for step in range(5)]
    assert (len(run.begun), run.ended) == (3, 2)
    assert [settings["group_size"] for settings in run.settings] == [4]
    assert [settings["seed"] for settings in run.settings] == [7]


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_of_a_recipe_are_two_runs_at_the_tracker(name: str, server: FakeServer, tmp_path: Path) -> None:
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        with LearningCurves(recipe(name), "grpo", folder, 0) as curves:
            reported(curves, 1)
    assert [[step for step, _ in run.points] for run in server.runs.values()] == [[1], [1]]


def test_runs_are_named_after_recipe_and_stage(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LearningCurves(recipe(*NAMES), "grpo", tmp_path, 0)
    wandb, trackio, mlflow = (run.begun[0] for run in server.runs.values())
    assert (wandb["project"], wandb["name"], wandb["dir"]) == ("guardreasoner-vl", "toy-grpo", str(tmp_path))
    assert (trackio["project"], trackio["group"]) == ("guardreasoner-vl", "toy-grpo")
    assert (mlflow["experiment_id"], mlflow["run_name"]) == ("guardreasoner-vl", "toy-grpo")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    LearningCurves(recipe("wandb"), "grpo", tmp_path, 0)
    assert server.runs["run-0"].begun[1]["project"] == "mine"


def test_tensorboard_shows_the_later_figures_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Files of one second and one process are read by this number, as text: the tenth comes before the ninth.
    event_file_writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    killed = LearningCurves(recipe("tensorboard"), "grpo", tmp_path, 0)
    reported(killed, 0, 1, 2, 3)
    with LearningCurves(recipe("tensorboard"), "grpo", tmp_path, 2) as curves:
        reported(curves, 2, 3, 4, reward=0.75)
    assert scalars(tmp_path, "reward") == [(0, 0.5), (1, 0.5), (2, 0.75), (3, 0.75), (4, 0.75)]
    assert scalars(tmp_path, "validation/f1") == [(step, 0.25) for step in range(5)]
    assert {path.name for path in tmp_path.iterdir()} == {"tensorboard"}


def test_several_figures_of_the_last_step_are_all_reported(server: FakeServer, tmp_path: Path) -> None:
    """The trainer reports a summary at the step whose figures it has reported before."""
    with LearningCurves(recipe("trackio"), "grpo", tmp_path, 0) as curves:
        curves.log({"loss": 1.0}, 10)
        curves.log({"runtime": 2.0}, 10)
    assert only_run(server).points == [(10, {"loss": 1.0}), (10, {"runtime": 2.0})]


def test_no_tracker_no_file(tmp_path: Path) -> None:
    with LearningCurves(recipe(), "grpo", tmp_path, 0) as curves:
        reported(curves, 0)
    assert list(tmp_path.iterdir()) == []


# --- faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_server_that_fails_does_not_end_the_training(
    name: str, server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LearningCurves(recipe("tensorboard", name), "grpo", tmp_path, 0) as curves:
        reported(curves, 0, 1)
        server.fault = ConnectionError("no route\nto the host")
        with caplog.at_level(logging.WARNING):
            reported(curves, 2, 3)
    assert [record.getMessage() for record in caplog.records] == [
        f"tracker {name} failed (ConnectionError: no route to the host): it gets no more figures until a resume"
    ]
    assert [step for step, _ in scalars(tmp_path, "reward")] == [0, 1, 2, 3]
    server.fault = None
    with LearningCurves(recipe(name), "grpo", tmp_path, 2) as curves:
        reported(curves, 2, 3)
    assert [step for step, _ in only_run(server).points] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", NAMES)
def test_a_server_that_refuses_a_run_is_named(name: str, server: FakeServer, tmp_path: Path) -> None:
    server.fault = ValueError("no key\nis set")
    wanted = rf"^tracker {name} cannot begin \(ValueError: no key is set\): correct its settings, or change `tracker`"
    with pytest.raises(TrackerError, match=wanted):
        LearningCurves(recipe(name), "grpo", tmp_path, 0)


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("no folder")
    with pytest.raises(OSError, match="tensorboard"):
        LearningCurves(recipe("tensorboard"), "grpo", tmp_path, 0)


@pytest.mark.parametrize("name", ["tensorboard", *NAMES])
def test_a_missing_package_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["aim"])
    wanted = rf"^tracker {name} is not installed: pip install {name}, or change `tracker` in the recipe$"
    with pytest.raises(RecipeError, match=wanted):
        check_installed(recipe(name).tracker)


def test_tensorboard_comes_with_the_extra_that_trains() -> None:
    check_installed(recipe("tensorboard").tracker)


def test_it_is_refused_before_any_stage_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["tensorboard"])
    lines: list[Any] = []
    with pytest.raises(RecipeError, match="pip install wandb"):
        run_pipeline(Run(short_recipe(tracker=["tensorboard", "wandb"]), tmp_path, tmp_path / "out", lines.append))
    assert not (tmp_path / "out").exists()
    assert not lines
