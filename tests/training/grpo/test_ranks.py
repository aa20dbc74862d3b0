"""Two ranks train as one does, go on where one stopped and the other way round, and stop together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from guardreasoner_vl.corpus.store import read_corpus
from guardreasoner_vl.errors import DataError, GuardError, RecipeError
from guardreasoner_vl.recipe import GrpoSection
from guardreasoner_vl.stages import grpo
from guardreasoner_vl.training.grpo.optimizer import balanced_owners
from guardreasoner_vl.training.grpo.ranks import DistributedContext
from guardreasoner_vl.training.model_folder import load_for_training
from tests.training.grpo import toy_grpo
from tests.training.grpo.toy_grpo import STEPS, adapted, checkpoints, log, parameters, recipe, shipped, weights

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Launch:
    """What two ranks did: the folder of their runs, how each run ended on each rank, and one rank's run alone."""

    out: Path
    ends: tuple[dict[str, Any], dict[str, Any]]
    alone: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_grpo.write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module", autouse=True)
def made_up() -> Iterator[None]:
    with toy_grpo.made_up():
        yield


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path, made_up: None) -> Launch:
    out = tmp_path_factory.mktemp("ranks")
    rows = list(read_corpus(data))

    def interrupt(now: grpo.TrainingStep) -> None:
        if now.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grpo.run(recipe(), tiny_model, data, out / "begun", rows, interrupt)
    grpo.run(recipe(), tiny_model, data, out / "alone", rows)
    grpo.run(adapted(recipe(steps=1)), tiny_model, data, out / "adapters alone", rows)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.training.grpo.worker", *map(str, (tiny_model, data, out))]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-5000:]
    first, second = (json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    return Launch(out, (first, second), out / "alone")


def assert_alike(out: Path, other: Path, step: int) -> None:
    """Up to the order of sums: weights after `step`, by how far they went from the start, and the log's figures."""
    first, second = weights(out, step), weights(other, step)
    assert first.keys() == second.keys()
    apart = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert apart < 0.02 * recipe().grpo.learning_rate * 2 * step
    for row, expected in zip(log(out), log(other), strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {"validation"}:
            wanted = expected[name] if name == "begun_with" else pytest.approx(expected[name], rel=1e-3, abs=1e-5)
            assert row[name] == wanted, (row["step"], name)


def test_the_launch(launch: Launch) -> None:
    assert [(end["rank"], end["count"]) for end in launch.ends] == [(0, 2), (1, 2)]
    assert {torch.device(end["device"]).type for end in launch.ends} == {"cpu"}


@pytest.mark.parametrize("step", [2, STEPS])
def test_two_ranks_train_as_one(launch: Launch, step: int) -> None:
    assert_alike(launch.out / "two", launch.alone, step)


def test_only_the_main_rank_reports(launch: Launch) -> None:
    assert [end["told"] for end in launch.ends] == [[1, 2, 3, 4], []]
    assert len(list((launch.out / "two" / "grpo" / "tensorboard").iterdir())) == 1
    assert [row["step"] for row in log(launch.out / "two")] == [0, 1, 2, 3, 4]


def test_two_ranks_go_on_where_one_stopped(launch: Launch) -> None:
    assert [end["begun"] for end in launch.ends] == ["begun/grpo/model"] * 2
    assert_alike(launch.out / "begun", launch.alone, STEPS)


def optimizer_state(out: Path, step: int) -> dict[int, dict[str, torch.Tensor]]:
    content = torch.load(out / "grpo" / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
    state: dict[int, dict[str, torch.Tensor]] = content["state"]
    return state


def test_the_optimizer_s_state_of_two_ranks_is_that_of_one(launch: Launch) -> None:
    first, second = optimizer_state(launch.out / "two", STEPS), optimizer_state(launch.alone, STEPS)
    assert first.keys() == second.keys()
    for name in ("step", "exp_avg", "exp_avg_sq"):
        apart = sum(float((first[place][name] - second[place][name]).square().sum()) for place in second)
        assert apart < 1e-3 * sum(float(state[name].square().sum()) for state in second.values())


def test_bf16_weights_on_every_rank_are_those_of_their_owners(launch: Launch, tiny_model: Path) -> None:
    """The main rank writes weights that the other rank has updated: they are the other's fp32 copies, rounded."""
    assert [end["halves"] for end in launch.ends] == ["halves/grpo/model"] * 2
    written, state = weights(launch.out / "halves", 1), optimizer_state(launch.out / "halves", 1)
    start = load_for_training(tiny_model, "bf16-weights")
    names = [name for name, _ in sorted(start.named_parameters(), key=lambda pair: pair[1].dim() <= 1)]
    for name, of_parameter in zip(names, state.values(), strict=True):
        assert torch.equal(written[name], of_parameter["master"].to(torch.bfloat16)), name
    assert any(not torch.equal(parameter, written[name]) for name, parameter in start.named_parameters())


def test_two_ranks_train_adapters_as_one(launch: Launch) -> None:
    assert [end["adapters"] for end in launch.ends] == ["adapters/grpo/model"] * 2
    assert_alike(launch.out / "adapters", launch.out / "adapters alone", 1)
    assert len(optimizer_state(launch.out / "adapters", 1)) == len(weights(launch.out / "adapters", 1)) == 28


def test_parameters_are_shared_out_evenly() -> None:
    assert balanced_owners([5, 9, 1, 4, 3], 2) == [1, 0, 1, 1, 0]  # 12 and 10
    assert balanced_owners([5, 9], 1) == [0, 0]


def test_sigterm_on_one_rank_stops_both_and_one_process_resumes(launch: Launch, tiny_model: Path, data: Path) -> None:
    stopped = "StoppedError: stopped after rollout batch 1: the same command resumes there"
    assert [end["stopped"] for end in launch.ends] == [stopped] * 2
    out = launch.out / "stopped"
    assert checkpoints(out) == [1]
    grpo.run(recipe(), tiny_model, data, out, list(read_corpus(data)))
    assert_alike(out, launch.alone, STEPS)


def test_a_rank_without_signal_takes_part(launch: Launch, tiny_model: Path) -> None:
    assert [end["quiet"] for end in launch.ends] == ["quiet/grpo/model"] * 2
    assert log(launch.out / "quiet")[-1]["with_signal"] == 0.5
    start, end = parameters(tiny_model), weights(launch.out / "quiet", 1)
    assert any(not torch.equal(start[name], end[name]) for name in end)
    assert shipped(launch.out / "quiet").keys() == end.keys()


def test_a_fault_on_one_rank_stops_both(launch: Launch) -> None:
    first, second = (end["nan"] for end in launch.ends)
    assert second.startswith("DivergedError: rollout batch 1: a reward is NaN")
    assert first.startswith("GuardError: another process failed")
    first, second = (end["full"] for end in launch.ends)
    assert first.startswith("DataError:")
    assert "make room" in first
    assert second.startswith("GuardError: another process failed")
    first, second = (end["two"] for end in launch.ends)
    assert "changed: grpo.learning_rate" in first
    assert second.startswith("GuardError: another process failed")


def test_what_ranks_cannot_share(launch: Launch) -> None:
    for end in launch.ends:
        assert end["odd"].startswith("RecipeError: grpo.update_batch 1 cannot be split over 2 processes")
    assert not (launch.out / "odd").exists()
    with pytest.raises(RecipeError, match="256 cannot be split over 3 processes: use a multiple"):
        DistributedContext(0, 3).check(GrpoSection())
    DistributedContext(0, 8).check(GrpoSection())


def test_parts_are_a_partition() -> None:
    items = list(range(12))
    parts = [DistributedContext(rank, 3).part(items) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == items
    assert [len(part) for part in parts] == [4, 4, 4]
    assert DistributedContext().part(items) == items


def test_one_rank_alone() -> None:
    rank = DistributedContext()
    assert rank.main
    assert rank.sum([1.0, 2.5]) == [1.0, 2.5]
    assert (rank.any(True), rank.any(False)) == (True, False)
    with pytest.raises(DataError, match="own"), rank.all_or_none():
        raise DataError("own")
    parameter = torch.nn.Parameter(torch.ones(2))
    rank.sum_gradients([parameter])
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0, 0]
    assert issubclass(DataError, GuardError)
