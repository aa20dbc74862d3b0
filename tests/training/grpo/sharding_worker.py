"""One rank of `test_sharding.py`, run by torchrun: several short runs with sharded weights.

    torchrun --nproc-per-node 2 -m tests.training.grpo.sharding_worker MODEL DATA OUT

Writes OUT/rank-N.json. In the last run the second rank kills itself in its second rollout batch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from guardreasoner_vl.errors import GuardError
from guardreasoner_vl.stages import grpo
from guardreasoner_vl.training.grpo import rollouts as grpo_rollouts
from guardreasoner_vl.training.grpo import update as grpo_update
from guardreasoner_vl.training.grpo.ranks import DistributedContext
from guardreasoner_vl.training.grpo.sharding import FullyShardedAdamW
from tests.training.grpo import toy_grpo

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.recipe import Recipe

SHARDED: dict[str, Any] = {
    "shard_weights": True,
    "gradient_checkpointing": True,
    "rollout_batch": 6,
    "pass_tokens": 150,
    "steps": 1,
    "save_every": 1,
    "evaluate_every": None,
    "learning_rate": 3e-4,
}
"""Three updates of two prompts, one on each rank, in passes that hold less than a group."""


UNTIED = "untied"
"""The folder, beside the rows, of a model whose language head has weights of its own."""


def in_order(training: Any, step: int) -> list[Any]:
    """The rows of every rollout batch in the order of the file, which decides what each rank sees."""
    rows: list[Any] = sorted(training._rows, key=lambda row: row.id)
    size = training._section.rollout_batch
    return [rows[number % len(rows)] for number in range(step * size, (step + 1) * size)]


def main(model: Path, data: Path, out: Path) -> None:
    ranks = DistributedContext.of_launch()
    second = ranks.rank == 1
    ends: dict[str, Any] = {}
    passes: list[tuple[int, bool]] = []
    shares: list[float] = []
    gathered: list[list[str]] = []
    make, step, compute_old = grpo_update.Passes.of, FullyShardedAdamW.step, grpo._Training._old

    def of(*arguments: Any) -> Any:
        made_passes = make(*arguments)
        real = [part for part in made_passes if len(part.weights)]
        passes.append((len(made_passes), len(real) < len(made_passes)))
        return made_passes

    def stepped(self: FullyShardedAdamW) -> None:
        local = sum(one.to_local().numel() for one in self._parameters if isinstance(one, DTensor))
        shares.append(local / sum(map(torch.numel, self._parameters)))
        step(self)

    def old(self: grpo._Training, groups: Any) -> torch.Tensor:
        logprobs = compute_old(self, groups)
        if self._copy:
            parameters = self._model.named_parameters()
            gathered.append([name for name, one in parameters if not isinstance(one, DTensor)])
        return logprobs

    def run(name: str, recipe: Recipe, rows: str = "mixed", start: Path = model) -> None:
        try:
            ends[name] = str(grpo.run(recipe, start, data / rows, out / name).relative_to(out))
        except GuardError as error:
            ends[name] = f"{type(error).__name__}: {error}"

    with toy_grpo.made_up() as patch:
        patch.setattr(grpo._Training, "_batch", in_order)
        patch.setattr(grpo_update.Passes, "of", of)
        patch.setattr(grpo._Training, "_old", old)
        patch.setattr(FullyShardedAdamW, "step", stepped)
        for name in ("text", "image", "mixed"):
            passes.clear()
            run(name, toy_grpo.recipe(**SHARDED), name)
            ends[f"{name} passes"] = list(passes)
        run("frozen", toy_grpo.recipe(**SHARDED | {"freeze_vision": True}))
        run("untied", toy_grpo.recipe(**SHARDED), start=data / UNTIED)
        run("resumed", toy_grpo.recipe(**SHARDED | {"steps": 2}))  # begun by one process
        run("bf16", toy_grpo.recipe(**SHARDED | {"precision": "bf16"}))
        with patch.context() as inner:
            if not second:
                inner.setattr(grpo_rollouts, "judge_completion", toy_grpo.rewarding(lambda _: 0.0))
            passes.clear()
            run("quiet", toy_grpo.recipe(**SHARDED))
            ends["quiet passes"] = list(passes)
            run("quiet whole", toy_grpo.recipe(**SHARDED | {"shard_weights": False}))
        with patch.context() as inner:
            inner.setattr(grpo, "accumulate", _out_of_memory)
            run("too large", toy_grpo.recipe(**SHARDED))
        (out / f"rank-{ranks.rank}.json").write_text(json.dumps({**ends, "shares": shares, "gathered": gathered}))
        if second:
            patch.setattr(grpo_rollouts, "judge_completion", _killing(13))
        grpo.run(toy_grpo.recipe(**SHARDED | {"steps": 2}), model, data / "mixed", out / "killed")


def _killing(count: int) -> Callable[..., Any]:
    """Judges; the completion of this number ends the process at once."""
    judge, judged = toy_grpo.rewarding(), []

    def completion(*arguments: Any) -> Any:
        judged.append(1)
        if len(judged) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return judge(*arguments)

    return completion


def _out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("as a GPU reports it")


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except GuardError as error:
        sys.exit(f"{type(error).__name__}: {error}")
