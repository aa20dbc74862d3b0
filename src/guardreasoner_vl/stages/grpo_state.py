"""GRPO's checkpoints, at rollout boundaries.

Everything random follows from the recipe's seed and the number of the rollout batch, so weights, the optimizer's state
and that number are all there is to a resume: it goes on exactly, and no rollout buffer has to be kept.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.run_dir import write_json
from guardreasoner_vl.stages.grpo_optimizer import restore
from guardreasoner_vl.stages.model_folder import emptied, move

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.pt", "state.json"
_KEPT = 2


@dataclass(frozen=True)
class State:
    """Rollout batches done, and a digest of the rows that they were drawn from."""

    step: int
    rows: str


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn what comes of a full disk into a `DataError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"{path} could not be written ({reason}): make room; the same command goes on from the last checkpoint"
        ) from error


def save_checkpoint(
    folder: Path, model: Any, optimizer_state: dict[str, Any], state: State, kept: Collection[int] = ()
) -> None:
    """Write `folder/checkpoint-STEP`, whole or not at all; of older ones the last stays, and weights of steps `kept`.

    Raises `DataError` if the disk does not take it.
    """
    target = folder / f"checkpoint-{state.step}"
    with written(target):
        partial = emptied(target)
        try:
            save_file(_weights(model), partial / _WEIGHTS)
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


def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer, rows: str) -> State:
    """The state to go on from; a fresh one if there is no checkpoint. Raises `DataError`.

    `rows` is the digest of the rows at hand, which must be the same.
    """
    found = _checkpoints(folder)
    if not found:
        return State(0, rows)
    _, newest = found[-1]
    try:
        state = State(**json.loads((newest / _STATE).read_text("utf-8")))
        load_weights(newest, model)
        restore(optimizer, torch.load(newest / _OPTIMIZER, map_location="cpu", weights_only=True))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{newest} cannot be read: remove it; the same command goes on from an earlier one") from error
    if state.rows != rows:
        raise DataError(f"{folder} holds a run on other rows: restore them, or give a new --out")
    return state


def load_weights(checkpoint: Path, model: Any) -> None:
    """Put a checkpoint's weights into the model."""
    weights = load_file(checkpoint / _WEIGHTS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().contiguous().cpu() for name, parameter in model.named_parameters()}


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints by step, the oldest first; one gets its name when all is written."""
    found = [path for path in folder.glob("checkpoint-*") if path.suffix != ".partial"]
    return sorted((int(path.name.split("-")[1]), path) for path in found)
