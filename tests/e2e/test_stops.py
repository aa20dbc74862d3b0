"""Whatever stops a stage, the same command ends as if nothing had: a kill anywhere, a torn line, a full disk, a second
process, an engine that dies and comes back, another model by mistake.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e import stopped_stages
from tests.e2e.stopped_stages import STAGES, Plan
from tests.tiny_model import write_tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import ForkServerProcess
    from pathlib import Path

pytestmark = pytest.mark.slow
TRAINING = ("sft", "grpo")
ASKING = ("batch", "evaluate", "robustness", "calibrate", "mine")
LOGS = {
    "batch": "verdicts.jsonl",
    "evaluate": "predictions.jsonl",
    "robustness": "original/predictions.jsonl",
    "calibrate": "calibration.json.rows/fast/predictions.jsonl",
    "mine": "candidates.jsonl",
    "synthesize": "reasoning.jsonl",
}
_SKIPPED = re.compile(r"\.pt$|\.pth$|training_args\.bin$|trainer_state\.json$")
"""Files that name times or what the process was; their names count, not their content."""

processes = multiprocessing.get_context("forkserver")


class Runs:
    """Runs of the stages in processes of their own, each started from one that has imported everything."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._whole: dict[str, tuple[Path, int]] = {}
        self._count = 0

    def start(self, stage: str, out: Path, plan: Plan) -> tuple[ForkServerProcess, Path]:
        self._count += 1
        results = self.root / f"results-{self._count}.json"
        process = processes.Process(target=stopped_stages.work, args=(stage, self.root, out, plan, results))
        process.start()
        return process, results

    def run(self, stage: str, out: Path, plan: Plan = Plan()) -> dict[str, Any]:  # noqa: B008
        """The results of a run that is not killed."""
        return self.ended(*self.start(stage, out, plan))

    def ended(self, process: ForkServerProcess, results: Path) -> dict[str, Any]:
        process.join(120)
        assert process.exitcode == 0
        content: dict[str, Any] = json.loads(results.read_text())
        return content

    def killed(self, stage: str, out: Path, point: int) -> int | None:
        """The exit code of a run that is killed at a point, if it gets there."""
        process, _ = self.start(stage, out, Plan(kill=point))
        process.join(120)
        return process.exitcode

    def whole(self, stage: str) -> tuple[Path, int]:
        """An undisturbed run, and how many points it had."""
        if stage not in self._whole:
            out = self.root / "whole" / stage
            out.parent.mkdir(exist_ok=True)
            results = self.run(stage, out)
            assert results["error"] == ""
            self._whole[stage] = (out, results["points"])
        return self._whole[stage]

    def finish(self, stage: str, out: Path) -> None:
        """The same command once more ends as the undisturbed run did."""
        assert self.run(stage, out)["error"] == ""
        resumed, theirs = content(out), content(self.whole(stage)[0])
        assert resumed.keys() == theirs.keys()
        for name in resumed:
            assert resumed[name] == theirs[name], name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("stops")
    stopped_stages.prepare(root)
    write_tiny_model(root / "tiny")
    write_tiny_model(root / "another", seed=5)
    processes.set_forkserver_preload(["tests.e2e.stopped_stages", "guardreasoner_vl.training.sft_trainer"])
    return Runs(root)


def content(out: Path) -> dict[str, Any]:
    """Every file below a folder, without what a clock or the folder's own name says."""
    return {
        str(path.relative_to(out)): _content(path, out)
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.parent.name != "tensorboard"  # a file for each process
    }


def _content(path: Path, out: Path) -> Any:
    name = path.relative_to(out).as_posix()
    if _SKIPPED.search(name):
        return None
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text().replace(str(out), "OUT")))
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(part) for key, part in value.items() if "seconds" not in key}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_anywhere_ends_as_if_it_had_not_been(stage: str, runs: Runs, tmp_path: Path) -> None:
    points, out = runs.whole(stage)[1], tmp_path / "out"
    draw = random.Random(f"7-{stage}")
    codes = [runs.killed(stage, out, draw.randrange(1, points)) for _ in range(2 if stage in TRAINING else 4)]
    assert codes[0] == -signal.SIGKILL
    runs.finish(stage, out)


@pytest.mark.parametrize("stage", LOGS)
def test_a_torn_line_is_made_again(stage: str, runs: Runs, tmp_path: Path) -> None:
    points, out = runs.whole(stage)[1], tmp_path / "out"
    log, draw = out / LOGS[stage], random.Random(f"torn-{stage}")
    for point in (points * 2 // 3, points // 2, points // 3):
        runs.killed(stage, out, point)
        if log.is_file() and log.stat().st_size:
            break
    with log.open("ab") as stream:
        whole = (runs.whole(stage)[0] / LOGS[stage]).read_bytes().splitlines()[-1]
        stream.write(whole[: draw.randrange(9, len(whole) - 1)])
    runs.finish(stage, out)


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_process_is_refused_in_one_line(stage: str, runs: Runs, tmp_path: Path) -> None:
    points, out = runs.whole(stage)[1], tmp_path / "out"
    go = tmp_path / "go"
    process, report = runs.start(stage, out, Plan(hold=points // 2, go=go))
    wait(lambda: go.with_suffix(".held").exists())
    before = content(out)
    try:
        error = runs.run(stage, out)["error"]
        assert content(out) == before
    finally:
        go.touch()
    assert error.startswith("DataError: ")
    assert re.search(r"another .*(batch|evaluate|robustness|calibrate|mine|synthesize|curate|augment|sft|grpo)", error)
    assert "is writing it; wait for it or " in error
    assert "\n" not in error
    assert runs.ended(process, report)["error"] == ""
    runs.finish(stage, out)


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_line_and_loses_nothing(stage: str, runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = sorted(path.stat().st_size for path in runs.whole(stage)[0].rglob("*") if path.is_file())
    for size in (sizes[-1] // 2,) if stage in TRAINING else (40, sizes[-1] // 2):
        error = runs.run(stage, out, Plan(disk=size))["error"]
        assert re.fullmatch(r"DataError: .* (cannot|could not) be written \(.*\): make room; the same command.*", error)
    runs.finish(stage, out)


@pytest.mark.parametrize("stage", ASKING)
def test_an_engine_that_dies_and_recovers(stage: str, runs: Runs, tmp_path: Path) -> None:
    out, draw = tmp_path / "out", random.Random(f"ill-{stage}")
    for _ in range(2):
        error = runs.run(stage, out, Plan(ill=draw.randrange(5, 10)))["error"]
        assert re.fullmatch(r"EngineError: \d+ consecutive rows got no answer \(out of order; .*\); mend .*", error)
    runs.finish(stage, out)


@pytest.mark.parametrize("stage", [*ASKING, "grpo"])
def test_another_model_is_refused_and_leaves_what_was_made(stage: str, runs: Runs, tmp_path: Path) -> None:
    points, out = runs.whole(stage)[1], tmp_path / "out"
    assert runs.killed(stage, out, points * 3 // 4) == -signal.SIGKILL
    before = {path: path.read_bytes() for path in out.rglob("*") if path.suffix in (".jsonl", ".safetensors")}
    error = runs.run(stage, out, Plan(model="another"))["error"]
    assert error.startswith("DataError: ")
    assert re.search("changed: model|verdicts of", error)
    assert re.search("a new output|another OUT|new --out", error)
    assert {path: path.read_bytes() for path in before} == before
    runs.finish(stage, out)
