"""One rank of `test_sft_sharding.py`, run by torchrun: short SFT runs with whole weights (DDP), and with sharded ones.

    torchrun --nproc-per-node 2 -m tests.training.sft_sharding_worker DATA OUT [resume]

Writes OUT/rank-N.json. In the last run the second rank kills itself once the first step is saved; with `resume` that
run alone goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file

from guardreasoner_vl.errors import GuardError
from guardreasoner_vl.recipe import LoraSection
from guardreasoner_vl.stages import sft
from guardreasoner_vl.training import model_folder
from guardreasoner_vl.training.model_folder import write_model
from guardreasoner_vl.training.sft_trainer import Collator, SupervisedOnlyTrainer
from tests.training import toy

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.recipe import Recipe

SHARDED: dict[str, Any] = {
    "shard_weights": True,
    "gradient_checkpointing": True,
    "epochs": 1,
    "learning_rate": 1e-3,
    "batch_size": 1,
    "total_batch": 4,
    "save_steps": 1,
    "deepspeed": None,
}
"""Three steps on 12 rows, each rank's share of a step in two passes of one row."""

WHOLE = SHARDED | {"shard_weights": False}

init_state = PartialState.__init__


def data_of(rows: str) -> dict[str, Any]:
    return {"sources": [toy.SOURCE | {"folder": rows}], "validation_share": 0}


def write_rows(root: Path) -> Path:
    """Sources of twelve rows in `root`: of text, of images, and of both."""
    records = toy.rows(48)
    text, images = ([row for row in records if ("images" in row) == kind] for kind in (False, True))
    for name, rows in (("text", text[:12]), ("image", images[:12]), ("mixed", text[:6] + images[:6])):
        toy.write_data(root / "made", rows)
        (root / "made" / "toy").rename(root / name)
    return root


def adapted(recipe: Recipe) -> Recipe:
    """The recipe with LoRA adapters."""
    return recipe.model_copy(update={"lora": LoraSection(rank=2, alpha=4)})


def write_model_and_fp32(model: Any, weights: Any, base: Path, folder: Path, *others: Any) -> None:
    """Writes the finished model, and beside it the weights in fp32, which it does not hold."""
    tensors = {name: tensor.float().clone() for name, tensor in weights.items()}
    save_file(tensors, folder.parent / "fp32.safetensors")
    write_model(model, weights, base, folder, *others)


def state_of_gpus(self: PartialState, *arguments: Any, **settings: Any) -> None:
    """accelerate shards on accelerators only: it is to take these processes for such."""
    init_state(self, *arguments, **settings)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def main(data: Path, out: Path, resume: bool) -> None:
    state = PartialState(cpu=True)
    if not resume:
        whole = toy.recipe(data_of("mixed"), **WHOLE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_folder, "write_model", write_model_and_fp32)
            sft.run(whole, data, out / "whole")
            sft.run(adapted(whole), data, out / "lora")
    PartialState.__init__ = state_of_gpus
    if resume:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_folder, "write_model", write_model_and_fp32)
            sft.run(toy.recipe(data_of("mixed"), **SHARDED), data, out / "killed")
        return
    ends: dict[str, Any] = {"blank": 0, "with_images": []}
    interrupting: list[Callable[[], None]] = []
    collate = Collator.__call__
    step, save = SupervisedOnlyTrainer.training_step, SupervisedOnlyTrainer._save_checkpoint

    def collated(self: Collator, rows: Any) -> dict[str, Any]:
        with_images = any(row["image_paths"] for row in rows)
        ends["blank"] += self.always_images and not with_images
        ends["with_images"].append(with_images)
        return collate(self, rows)

    def stepped(self: SupervisedOnlyTrainer, model: Any, *arguments: Any) -> Any:
        parameters = list(model.parameters())
        ends["share"] = sum(parameter.to_local().numel() for parameter in parameters) / sum(
            map(torch.numel, parameters)
        )
        return step(self, model, *arguments)

    def saved(self: SupervisedOnlyTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        if interrupting:
            interrupting.pop()()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_folder, "write_model", write_model_and_fp32)
        patch.setattr(Collator, "__call__", collated)
        patch.setattr(SupervisedOnlyTrainer, "training_step", stepped)
        patch.setattr(SupervisedOnlyTrainer, "_save_checkpoint", saved)
        for rows in ("text", "image", "mixed"):
            ends["with_images"] = []
            sft.run(toy.recipe(data_of(rows), **SHARDED), data, out / rows)
        ends["mixed"] = ends.pop("with_images")
        ends["with_images"] = []
        interrupting.append(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            sft.run(toy.recipe(data_of("mixed"), **SHARDED), data, out / "resumed")
        sft.run(toy.recipe(data_of("mixed"), **SHARDED), data, out / "resumed")
        try:
            sft.run(toy.recipe(data_of("mixed"), **SHARDED), data, out / "begun")  # by one process
        except GuardError as error:
            ends["begun"] = str(error)
        (out / f"rank-{state.process_index}.json").write_text(json.dumps(ends))
        if state.process_index == 1:
            interrupting.append(lambda: os.kill(os.getpid(), signal.SIGKILL))
        sft.run(toy.recipe(data_of("mixed"), **SHARDED), data, out / "killed")


def interrupt() -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), "resume" in sys.argv[3:])
    except GuardError as error:
        sys.exit(f"{type(error).__name__}: {error}")
