"""One rank of `test_vllm_rollouts.py`, run by torchrun, with a server in the test's process.

torchrun --nproc-per-node 2 -m tests.training.grpo.vllm_worker MODEL DATA OUT BASE_URL
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from guardreasoner_vl.stages import grpo
from tests.training.grpo import toy_grpo


def main(model: Path, data: Path, out: Path, base_url: str) -> None:
    rollouts = {"engine": "vllm-server", "base_url": base_url}
    with toy_grpo.made_up():
        grpo.run(toy_grpo.recipe(rollouts=rollouts, evaluate_every=None), model, data, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    model, data, out = map(Path, sys.argv[1:4])
    main(model, data, out, sys.argv[4])
