"""One rank of `test_grpo_ranks.py`, run by torchrun: several short runs, and how each of them ended on this rank.

    torchrun --nproc-per-node 2 -m tests.training.grpo.worker MODEL DATA OUT

All in one launch, because its imports take longer than its training. Writes OUT/rank-N.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from guardreasoner_vl.corpus.store import read_corpus
from guardreasoner_vl.errors import GuardError
from guardreasoner_vl.stages import grpo
from guardreasoner_vl.training.grpo import rollouts as grpo_rollouts
from guardreasoner_vl.training.grpo import state as grpo_state
from guardreasoner_vl.training.grpo.ranks import DistributedContext
from tests.training.grpo import toy_grpo

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.recipe import Recipe
    from guardreasoner_vl.stages.grpo import TrainingStep


def main(model: Path, data: Path, out: Path) -> None:
    ranks = DistributedContext.of_launch()
    second = ranks.rank == 1
    rows = list(read_corpus(data))
    ends: dict[str, Any] = {"rank": ranks.rank, "count": ranks.count, "device": str(ranks.device)}

    def run(name: str, recipe: Recipe) -> None:
        try:
            ends[name] = str(grpo.run(recipe, model, data, out / name, rows, steps.append).relative_to(out))
        except GuardError as error:
            ends[name] = f"{type(error).__name__}: {error}"

    with toy_grpo.made_up() as patch:
        for pickled in ("broadcast_object_list", "gather_object"):  # of AdamW's whole state they would take an hour
            patch.setattr(torch.distributed, pickled, _pickling)
        steps: list[TrainingStep] = []
        run("two", toy_grpo.recipe())
        ends["told"] = [one.step for one in steps]
        run("begun", toy_grpo.recipe())  # by one rank
        run("two", toy_grpo.recipe(learning_rate=1e-5))
        run("odd", toy_grpo.recipe(update_batch=1))
        run("halves", toy_grpo.recipe(precision="bf16-weights", steps=1))
        run("adapters", toy_grpo.adapted(toy_grpo.recipe(steps=1)))
        for name, only, judge in (
            ("stopped", second, _terminating()),
            ("quiet", not second, toy_grpo.rewarding(lambda _: 0.0)),
            ("nan", second, toy_grpo.rewarding(lambda _: float("nan"))),
        ):
            with patch.context() as inner:
                if only:
                    inner.setattr(grpo_rollouts, "judge_completion", judge)
                run(name, toy_grpo.recipe(steps=1) if name == "quiet" else toy_grpo.recipe())
        with patch.context() as inner:
            inner.setattr(grpo_state, "save_file", _full)
            run("full", toy_grpo.recipe())
    (out / f"rank-{ranks.rank}.json").write_text(json.dumps(ends))
    torch.distributed.destroy_process_group()


def _pickling(*_: Any, **__: Any) -> None:
    raise GuardError("state is sent tensor by tensor")


def _terminating() -> Callable[..., Any]:
    """Judges, and in the second batch sends this process alone a SIGTERM."""
    judge, count = toy_grpo.rewarding(), []

    def completion(*arguments: Any) -> Any:
        count.append(1)
        if len(count) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(*arguments)

    return completion


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
