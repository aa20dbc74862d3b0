"""GRPO's checkpoints, written between rollout batches.

All randomness follows from the recipe's seed and the number of the rollout batch, so a checkpoint of the weights, the
optimizer's state and that number resumes exactly, without a rollout buffer.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.storage.atomic import PARTIAL, write_json
from guardreasoner_vl.storage.resume import refuse_changed
from guardreasoner_vl.training.grpo.sharding import shard_like, trained_weights
from guardreasoner_vl.training.model_folder import emptied, move, written

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from guardreasoner_vl.training.grpo.optimizer import ShardedAdamW
    from guardreasoner_vl.training.grpo.sharding import FullyShardedAdamW

_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.pt", "state.json"
_KEPT = 2


@dataclass(frozen=True)
class State:
    """The number of rollout batches done, and digests of the rows, the start model and the validation rows."""

    step: int
    rows: str
    model: str
    validation: str

    @property
    def begun_with(self) -> dict[str, str]:
        """The digests, by name."""
        return {"model": self.model, "rows": self.rows, "validation": self.validation}


def save_checkpoint(
    folder: Path,
    weights: dict[str, torch.Tensor],
    optimizer_state: dict[str, Any],
    state: State,
    kept: Collection[int] = (),
) -> None:
    """Write `folder/checkpoint-STEP`, whole or not at all, and remove older ones.

    The checkpoint before it stays; of steps in `kept` the weights stay. Raises `DataError` if the disk is full.
    """
    target = folder / f"checkpoint-{state.step}"
    with written(target):
        partial = emptied(target)
        try:
            save_file(weights, partial / _WEIGHTS)
            torch.save(optimizer_state, partial / _OPTIMIZER)
            write_json(partial / _STATE, asdict(state))
            move(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    for step, old in _checkpoints(folder)[:-_KEPT]:
        if step in kept:
            (old / _OPTIMIZER).unlink(missing_ok=True)
        else:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, model: Any, optimizer: ShardedAdamW | FullyShardedAdamW, start: State) -> State:
    """Load the newest checkpoint into model and optimizer; returns its state, or `start` if there is none.

    Raises `DataError` if the checkpoint cannot be read, or its run began with other rows or another model than `start`.
    """
    usable = [path for _, path in _checkpoints(folder) if (path / _OPTIMIZER).is_file()]
    if not usable:
        return start
    newest = usable[-1]
    try:
        state = State(**json.loads((newest / _STATE).read_text("utf-8")))
        if state.begun_with == start.begun_with:
            load_weights(newest, model)
            # With mmap each rank reads only its share of AdamW's state.
            optimizer.restore(torch.load(newest / _OPTIMIZER, map_location="cpu", weights_only=True, mmap=True))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        earlier = usable[-2].name if len(usable) > 1 else "the start"
        raise DataError(
            f"{newest} cannot be read: remove its {_OPTIMIZER} and nothing else, then run the same command to resume "
            f"from {earlier}"
        ) from error
    check_begun(folder, state.begun_with, start)
    return state


def check_begun(folder: Path, begun: Mapping[str, str], start: State) -> None:
    """Raises `DataError` if the run in `folder` began with another model or other rows than `start`."""
    refuse_changed(folder, "an RL run", begun, start.begun_with)


def load_best(folder: Path, step: int, model: Any) -> None:
    """Load the weights of the best step into the model. Raises `DataError` if they cannot be read."""
    best = folder / f"checkpoint-{step}"
    try:
        load_weights(best, model)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{best}, the best checkpoint, cannot be read: restore it, or give a new --out") from error


def load_weights(checkpoint: Path, model: Any) -> None:
    """Load a checkpoint's weights into the model."""
    weights = load_file(checkpoint / _WEIGHTS)
    with torch.no_grad():
        for name, parameter in trained_weights(model):
            parameter.copy_(shard_like(weights[name], parameter))


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints by step, the oldest first; a folder gets its final name once all is written."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.suffix != PARTIAL]
    return sorted((int(path.name.split("-")[1]), path) for path in checkpoints)
