"""Two ranks with sharded weights train as one process does, whatever each of them sees, and end when one is missed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from guardreasoner_vl.corpus.store import CorpusInfo, write_corpus
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.stages import grpo
from guardreasoner_vl.storage.atomic import write_json
from tests.training import toy
from tests.training.grpo import toy_grpo
from tests.training.grpo.sharding_worker import SHARDED, UNTIED, in_order
from tests.training.grpo.toy_grpo import checkpoints, halves, parameters, shipped, weights

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-5  # the weights move by up to 9e-4 in three updates


@dataclass(frozen=True)
class Launch:
    """What two ranks did: the folder of their runs, how each ended on each rank, how the launch ended (by a killed
    rank), and one process's runs."""

    out: Path
    ends: tuple[dict[str, Any], dict[str, Any]]
    returncode: int
    stderr: str
    alone: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Corpora of six rows: of text, of images, and of both in turn, so that the first rank sees only text; a model."""
    root = tmp_path_factory.mktemp("rows")
    written = toy.write_data(root / "files", toy.rows(24))
    rows = list(read_samples(written / "toy" / "train.jsonl"))
    text, images = ([row for row in rows if bool(row.images) == kind][:6] for kind in (False, True))
    mixed = [row for pair in zip(text[:3], images[:3], strict=True) for row in pair]
    for name, chosen in (("text", text), ("image", images), ("mixed", mixed)):
        named = [row.model_copy(update={"id": f"{place}-{row.id}"}) for place, row in enumerate(chosen)]
        write_corpus(root / name, CorpusInfo(name="toy"), named)
    shutil.copytree(tiny_model, root / UNTIED)
    config = json.loads((tiny_model / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    write_json(root / UNTIED / "config.json", config | {"tie_word_embeddings": False})
    tensors = load_file(tiny_model / "model.safetensors")
    embedding = next(tensor for name, tensor in tensors.items() if "embed_tokens" in name)
    head = embedding.roll(1, 0).contiguous()
    save_file({**tensors, "lm_head.weight": head}, root / UNTIED / "model.safetensors", {"format": "pt"})
    return root


@pytest.fixture(scope="module", autouse=True)
def made_up() -> Iterator[None]:
    with toy_grpo.made_up() as patch:
        patch.setattr(grpo._Training, "_batch", in_order)
        yield


def alone(model: Path, data: Path, out: Path, rows: str = "mixed", **section: Any) -> Path:
    """Train in this process, where `shard_weights` has no effect."""
    grpo.run(toy_grpo.recipe(**SHARDED | section), model, data / rows, out)
    return out


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path, made_up: None) -> Launch:
    out = tmp_path_factory.mktemp("sharded")
    for rows in ("text", "image", "mixed"):
        alone(tiny_model, data, out / "alone" / rows, rows)
    alone(tiny_model, data, out / "alone" / "frozen", freeze_vision=True)
    alone(data / UNTIED, data, out / "alone" / UNTIED)
    alone(tiny_model, data, out / "alone" / "two", steps=2)

    def interrupt(_now: grpo.TrainingStep) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grpo.run(toy_grpo.recipe(**SHARDED | {"steps": 2}), tiny_model, data / "mixed", out / "resumed", (), interrupt)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.training.grpo.sharding_worker", *map(str, (tiny_model, data, out))]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (out / "rank-0.json").is_file(), ended.stderr[-5000:]
    first, second = (json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    return Launch(out, (first, second), ended.returncode, ended.stderr, out / "alone")


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).detach().abs().max()) for name in first)


@pytest.mark.parametrize("name", ["text", "image", "mixed", "frozen", UNTIED])
def test_three_updates_are_those_of_one_process(launch: Launch, data: Path, tiny_model: Path, name: str) -> None:
    assert [end[name] for end in launch.ends] == [f"{name}/grpo/model"] * 2
    updated = weights(launch.out / name, 1)
    assert apart(updated, weights(launch.alone / name, 1)) < TOLERANCE
    start = parameters(data / UNTIED if name == UNTIED else tiny_model)
    assert apart(updated, {part: start[part] for part in updated}) > 50 * TOLERANCE
    assert any("visual" in part for part in updated) == (name != "frozen")


def test_every_rank_makes_as_many_passes_of_its_share(launch: Launch) -> None:
    for rows in ("text", "image", "mixed"):
        first, second = (end[f"{rows} passes"] for end in launch.ends)
        assert [count for count, _ in first] == [count for count, _ in second]
    first, second = (end["quiet passes"] for end in launch.ends)  # the first has nothing of its own
    assert [count for count, _ in first] == [count for count, _ in second]
    assert all(padded for _, padded in first)
    assert all(share == pytest.approx(0.5, abs=0.02) for end in launch.ends for share in end["shares"])


def test_nothing_stays_gathered_after_the_old_log_probabilities(launch: Launch) -> None:
    """Updates without signal make no pass that would gather the weights anew after their steps."""
    for end in launch.ends:
        assert len(end["gathered"]) > 10
        assert not any(end["gathered"])


def test_a_sharded_run_resumes_what_one_process_began(launch: Launch) -> None:
    assert [end["resumed"] for end in launch.ends] == ["resumed/grpo/model"] * 2
    assert apart(weights(launch.out / "resumed", 2), weights(launch.alone / "two", 2)) < 2 * TOLERANCE


def test_a_rank_without_signal_takes_part(launch: Launch, tiny_model: Path) -> None:
    assert [end["quiet"] for end in launch.ends] == ["quiet/grpo/model"] * 2
    assert apart(weights(launch.out / "quiet", 1), weights(launch.out / "quiet whole", 1)) < TOLERANCE
    assert apart(weights(launch.out / "quiet", 1), parameters(tiny_model)) > 50 * TOLERANCE


def test_bf16_computes_on_fp32_shares(launch: Launch, tiny_model: Path) -> None:
    assert [end["bf16"] for end in launch.ends] == ["bf16/grpo/model"] * 2
    updated = weights(launch.out / "bf16", 1)
    assert {tensor.dtype for tensor in updated.values()} == {torch.float32}
    assert 1e-4 < apart(updated, parameters(tiny_model)) < 1e-2


def test_the_finished_folder_is_whole_and_a_guard(launch: Launch) -> None:
    folder = launch.out / "mixed" / "grpo" / "model"
    assert apart(shipped(launch.out / "mixed"), halves(weights(launch.out / "mixed", 1))) == 0
    guard = Guard.load(str(folder))
    assert guard.moderate("how to bake a cake").usage.completion_tokens > 0


def test_memory_that_runs_out_ends_the_run(launch: Launch) -> None:
    """Passes of half the tokens would not be those that the other ranks wait for."""
    for end in launch.ends:
        assert end["too large"].startswith(
            "EngineError: an update ran out of the device's memory: set grpo.pass_tokens: 75,"
        )


def test_a_killed_rank_ends_the_others_and_one_process_resumes(launch: Launch, tiny_model: Path, data: Path) -> None:
    assert launch.returncode != 0
    assert "GuardError: another process of this launch has ended: read its message, then run the same" in launch.stderr
    killed = launch.out / "killed"
    assert checkpoints(killed) == [1]
    alone(tiny_model, data, killed, steps=2)
    assert apart(weights(killed, 2), weights(launch.alone / "two", 2)) < 2 * TOLERANCE
