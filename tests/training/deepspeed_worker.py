"""One rank of `test_sft_deepspeed.py`, run by torchrun: short SFT runs with DeepSpeed's ZeRO stages 2 and 3 on a CPU.

    torchrun --nproc-per-node 2 -m tests.training.deepspeed_worker DATA MODEL OUT

Writes OUT/rank-N.json before the last run, which is interrupted once the first step is saved, and then resumed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from guardreasoner_vl.recipe import load_recipe, parse_recipe
from guardreasoner_vl.stages import sft
from guardreasoner_vl.training import model_folder, sft_trainer
from guardreasoner_vl.training.sft_trainer import SupervisedOnlyTrainer
from tests.smoke import PATH
from tests.training import toy
from tests.training.sft_sharding_worker import WHOLE, data_of, interrupt, write_model_and_fp32

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.recipe import Recipe

_FEW = 100_000
"""Elements of a bucket: by default it would have gigabytes, for a model of kilobytes."""


def recipe(model: Path, stage: int) -> Recipe:
    """The toy recipe with the shipped configuration of DeepSpeed at this stage; no weight is too small to be shared."""
    zero = {"stage": stage, "reduce_bucket_size": _FEW, "stage3_param_persistence_threshold": 0}
    zero |= {"allgather_bucket_size": _FEW, "stage3_prefetch_bucket_size": _FEW}
    content = toy.recipe(data_of("mixed"), **WHOLE).model_dump(mode="json")
    shipped = load_recipe(PATH.parent / "3b.yaml").sft.deepspeed or {}
    content["sft"]["deepspeed"] = {**shipped, "zero_optimization": zero}
    return parse_recipe({**content, "model": {"path": str(model)}})


def share(model: Any) -> float:
    """The share of the weights that this rank has between two passes."""
    local, whole = 0, 0
    for parameter in model.parameters():
        local += getattr(parameter, "ds_tensor", parameter).numel()
        whole += getattr(parameter, "ds_numel", parameter.numel())
    return local / whole


def main(data: Path, model: Path, out: Path) -> None:
    communication: Any = importlib.import_module("deepspeed.comm.torch")
    communication.build_shm_op = lambda: None  # it would compile an extension, and Gloo does without
    # accelerate has DeepSpeed for accelerators only: it is not to be told of the CPU, and to count its processes.
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    shares: list[float] = []
    interrupting: list[Callable[[], None]] = []
    step, save = SupervisedOnlyTrainer.training_step, SupervisedOnlyTrainer._save_checkpoint

    def stepped(self: SupervisedOnlyTrainer, network: Any, *arguments: Any) -> Any:
        shares[-1] = share(network)
        return step(self, network, *arguments)

    def saved(self: SupervisedOnlyTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        if interrupting:
            interrupting.pop()()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "_accelerator", lambda: True)
        patch.setattr(sft_trainer, "_WORKERS", 0)
        patch.setattr(model_folder, "write_model", write_model_and_fp32)
        patch.setattr(SupervisedOnlyTrainer, "training_step", stepped)
        patch.setattr(SupervisedOnlyTrainer, "_save_checkpoint", saved)
        for stage in (2, 3):
            shares.append(0.0)
            sft.run(recipe(model, stage), data, out / f"zero-{stage}")
        (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(shares))
        interrupting.append(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            sft.run(recipe(model, 3), data, out / "resumed")
        sft.run(recipe(model, 3), data, out / "resumed")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
