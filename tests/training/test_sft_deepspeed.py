"""SFT on two ranks with DeepSpeed's ZeRO stages 2 and 3: one process's weights, shares, whole folders, resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from guardreasoner_vl.guard import Guard
from guardreasoner_vl.stages import sft
from guardreasoner_vl.training import model_folder
from tests.training import toy
from tests.training.sft_sharding_worker import WHOLE, data_of, write_model_and_fp32, write_rows

if find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
ROOT = Path(__file__).parents[2]
SECONDS = 300


@dataclass(frozen=True)
class Launch:
    """The folder of two ranks' runs, what they wrote to stderr, and one process's run from the same weights."""

    out: Path
    stderr: str
    alone: Path


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    data, out = write_rows(tmp_path_factory.mktemp("rows")), tmp_path_factory.mktemp("deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_folder, "write_model", write_model_and_fp32)
        sft.run(toy.recipe(data_of("mixed"), **WHOLE), data, out / "alone")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("extensions")),  # no lock of another run
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    work = ["-m", "tests.training.deepspeed_worker", *map(str, (data, out / "alone" / "base", out))]
    return Launch(out, ended([*torchrun, *work], environment), out / "alone")


def ended(command: list[str], environment: dict[str, str]) -> str:
    """What a launch writes to stderr until it ends; after `SECONDS` it is ended."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        return process.communicate(timeout=SECONDS)[1]
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its processes, which SIGKILL would leave behind
        return f"{process.communicate(timeout=60)[1]}\nstill running after {SECONDS} s"


@pytest.mark.parametrize("run", ["zero-2", "zero-3", "resumed"])
def test_three_steps_are_those_of_one_process(launch: Launch, run: str) -> None:
    path = launch.out / run / "sft" / "fp32.safetensors"
    assert path.is_file(), launch.stderr[-5000:]
    sharded, alone = load_file(path), load_file(launch.alone / "sft" / "fp32.safetensors")
    assert sharded.keys() == alone.keys()
    assert max(float((sharded[name] - alone[name]).abs().max()) for name in alone) < 1e-5


def test_ranks_have_shares_of_the_weights_at_stage_3(launch: Launch) -> None:
    for rank in (0, 1):
        path = launch.out / f"rank-{rank}.json"
        assert path.is_file(), launch.stderr[-5000:]
        assert json.loads(path.read_text()) == [1, pytest.approx(0.5, abs=0.02)]


@pytest.mark.parametrize("run", ["zero-2", "zero-3"])
def test_checkpoints_and_the_finished_folder_are_whole(launch: Launch, run: str) -> None:
    folder = launch.out / run / "sft"
    assert (folder / "model").is_dir(), launch.stderr[-5000:]
    start = load_file(launch.alone / "base" / "model.safetensors")
    for written in ("checkpoint-3", "model"):
        tensors = load_file(folder / written / "model.safetensors")
        assert all(tensors[name].shape == tensor.shape for name, tensor in start.items())
    assert Guard.load(str(folder / "model")).moderate("how to bake a cake").usage.completion_tokens > 0
