"""The launch of a training stage: how many processes share it, and the refusal of several GPUs without a launcher."""

from __future__ import annotations

import os

from guardreasoner_vl.errors import GuardError


def process_count() -> int:
    """Processes of the launch by `accelerate launch` or `torchrun`; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch() -> None:
    """Raise `GuardError` if this process sees several GPUs and no launcher started it.

    SFT's trainer would wrap the model in `DataParallel`, which cuts a packed row apart, and RL would use one GPU.
    """
    import torch

    count = torch.cuda.device_count()
    if count > 1 and "LOCAL_RANK" not in os.environ:
        raise GuardError(
            f"{count} GPUs are visible and no launcher started this process: start the stages sft and grpo with "
            f"`accelerate launch --num_processes {count} --no_python guardreasoner-vl ...` (`run RECIPE --plan --gpus "
            f"{count}` prints the commands), or set CUDA_VISIBLE_DEVICES=0 to train on one GPU"
        )
