"""Checks how a training stage was launched: its processes, and whether they share the weights."""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pydantic import ValidationError

from guardreasoner_vl.errors import GuardError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guardreasoner_vl.recipe import GrpoSection, SftSection

PATIENCE = timedelta(hours=6)
"""How long a process waits for another: for the slowest one's rollouts, or for the first one to read all rows, measure
their images and make the start model."""


def process_count() -> int:
    """Processes of the launch by `accelerate launch` or `torchrun`; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch() -> None:
    """Raise `GuardError` for several GPUs without a launcher, and for DeepSpeed by accelerate's configuration.

    SFT's trainer would wrap the model in `DataParallel`, which cuts a packed row apart, and RL would use one GPU.
    DeepSpeed by accelerate's configuration would have other settings than the recipe, and RL cannot use it.
    """
    import torch

    if "ACCELERATE_CONFIG_DS_FIELDS" in os.environ:  # set by `accelerate launch` alone, and only for DeepSpeed
        raise RecipeError(
            "accelerate's configuration asks for DeepSpeed: launch without it, and give DeepSpeed's settings as "
            "sft.deepspeed"
        )
    count = torch.cuda.device_count()
    if count > 1 and "LOCAL_RANK" not in os.environ:
        raise GuardError(
            f"{count} GPUs are visible and no launcher started this process: start the stages sft and grpo with "
            f"`accelerate launch --num_processes {count} --no_python guardreasoner-vl ...` (`run RECIPE --plan --gpus "
            f"{count}` prints the commands), or set CUDA_VISIBLE_DEVICES=0 to train on one GPU"
        )


def check_deepspeed(section: SftSection) -> None:
    """Raise `RecipeError` if SFT needs DeepSpeed and it is not installed, or no launcher started this process."""
    if not section.deepspeed:
        return
    if find_spec("deepspeed") is None:
        raise RecipeError("sft.deepspeed needs `pip install deepspeed`; or set it to null if the model fits one GPU")
    if "LOCAL_RANK" not in os.environ:  # DeepSpeed would look for MPI
        raise RecipeError(
            "sft.deepspeed needs a launcher, on one GPU too: start the stage sft with `torchrun --nproc-per-node 1 "
            "--no-python guardreasoner-vl ...`, or set it to null"
        )


def shards_weights(section: SftSection | GrpoSection) -> bool:
    """Whether this launch's processes share the weights: by the recipe, or by accelerate's configuration (FSDP).

    Raises `RecipeError` if the configuration does not suit the recipe.
    """
    if process_count() == 1:
        return False
    version = os.environ.get("FSDP_VERSION")  # set by `accelerate launch` alone, and only for FSDP
    if version is None:
        return section.shard_weights
    if version != "2":
        raise RecipeError("accelerate's configuration asks for FSDP 1: set fsdp_version: 2 in it")
    # The stages read the weights themselves, the same on each rank; with this option only the first rank would.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        section.model_validate({**section.model_dump(), "shard_weights": True})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"accelerate's configuration shards the weights: {reason}") from error
    return True


@contextmanager
def peers_alive() -> Iterator[None]:
    """Convert errors caused by the end of another process of the launch to `GuardError`."""
    from torch.distributed import DistError

    try:
        yield
    except RuntimeError as error:  # Gloo raises no class of its own
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        raise GuardError(
            "another process of this launch has ended: read its message, then run the same command to resume from the "
            "last checkpoint"
        ) from error
