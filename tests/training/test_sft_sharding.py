"""SFT on two ranks, with whole weights and with weights that accelerate shards: one process's weights, whole folders,
resume, a clear end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from guardreasoner_vl.guard import Guard
from guardreasoner_vl.stages import sft
from guardreasoner_vl.stages.sft import last_checkpoint
from guardreasoner_vl.training import model_folder
from tests.training import toy
from tests.training.sft_sharding_worker import (
    SHARDED,
    WHOLE,
    adapted,
    data_of,
    write_model_and_fp32,
    write_rows,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Launch:
    """What two ranks did: the folder of their runs, what each noted, how the launch ended (by a killed rank), one
    process's runs, and the checkpoint that the killed run had before another launch resumed it."""

    out: Path
    ends: tuple[dict[str, Any], dict[str, Any]]
    returncode: int
    stderr: str
    alone: Path
    left_by_kill: str | None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Launch:
    out = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_folder, "write_model", write_model_and_fp32)
        for rows in ("text", "image", "mixed"):
            sft.run(toy.recipe(data_of(rows), **SHARDED), data, out / "alone" / rows)
        sft.run(adapted(toy.recipe(data_of("mixed"), **WHOLE)), data, out / "alone" / "lora")
    shutil.copytree(out / "alone" / "mixed", out / "begun")
    shutil.rmtree(out / "begun" / "sft" / "model")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.training.sft_sharding_worker", *map(str, (data, out))]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (out / "rank-0.json").is_file(), ended.stderr[-5000:]
    first, second = (json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    left_by_kill = last_checkpoint(out / "killed" / "sft")
    resumed = subprocess.run(
        [*command, "resume"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert resumed.returncode == 0, resumed.stderr[-5000:]
    return Launch(out, (first, second), ended.returncode, ended.stderr, out / "alone", left_by_kill)


def final(out: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(out / "sft" / "fp32.safetensors")
    return tensors


@pytest.mark.parametrize("run", ["text", "image", "mixed", "resumed", "killed", "whole", "lora"])
def test_three_steps_are_those_of_one_process(launch: Launch, run: str) -> None:
    sharded, alone = (
        final(launch.out / run),
        final(launch.alone / (run if run in ("text", "image", "lora") else "mixed")),
    )
    assert sharded.keys() == alone.keys()
    assert max(float((sharded[name] - alone[name]).abs().max()) for name in alone) < 1e-5


def test_three_steps_move_the_adapted_weights(launch: Launch) -> None:
    start = load_file(launch.alone / "lora" / "base" / "model.safetensors")
    moved = load_file(launch.out / "lora" / "sft" / "model" / "model.safetensors")
    assert any(not torch.equal(moved[name], start[name].to(torch.bfloat16)) for name in start)


def test_ranks_hold_shares_and_see_blank_images(launch: Launch) -> None:
    assert all(end["share"] == pytest.approx(0.5, abs=0.02) for end in launch.ends)
    assert all(end["blank"] >= 6 for end in launch.ends)


def test_in_a_mixed_pass_one_rank_has_text_and_the_other_images(launch: Launch) -> None:
    first, second = (end["mixed"] for end in launch.ends)
    assert len(first) == len(second) == 6
    assert first != second


def test_the_finished_folder_is_a_guard(launch: Launch) -> None:
    guard = Guard.load(str(launch.out / "mixed" / "sft" / "model"))
    assert guard.moderate("how to bake a cake").usage.completion_tokens > 0


def test_a_checkpoint_of_the_other_kind_is_refused(launch: Launch) -> None:
    for end in launch.ends:
        assert end["begun"].endswith("was written without sharded weights: set sft.shard_weights: false to resume")


def test_a_killed_rank_ends_the_others_and_leaves_a_checkpoint(launch: Launch) -> None:
    """The other one ends by its own message, or by the launcher's SIGTERM where that comes first."""
    assert launch.returncode != 0
    message = "GuardError: another process of this launch has ended: read its message, then run the same command"
    assert message in launch.stderr or "Signal 15 (SIGTERM)" in launch.stderr
    assert "RuntimeError" not in launch.stderr
    assert launch.left_by_kill == str(launch.out / "killed" / "sft" / "checkpoint-1")
