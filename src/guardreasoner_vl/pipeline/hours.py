"""Hours that SFT, mining and RL take, computed from shapes and a GPU's published peaks, never measured.

A GPU is taken to reach a share of its peaks (`UTILISATION`), and rows to be alike (`TYPICAL`). With F the FLOPs of a
forward pass over a row, its answer's logits included:

    SFT       k F for each row and epoch; k = 3 (a backward pass takes two forward passes), 4 with checkpointing
    mining    each answer as `pipeline.capacity` computes it, on one GPU
    RL        answers likewise, prompts read once a group; k F' an update, F' with the prompt once a group, and F' for
              the old log-probabilities of all updates of a rollout batch but the first

LoRA's frozen weights need no gradient of their own: a backward pass takes one forward pass, k = 2, or 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.pipeline.capacity import Work, capacity, prefill_flops
from guardreasoner_vl.pipeline.memory import ANSWER

if TYPE_CHECKING:
    from guardreasoner_vl.pipeline.capacity import Capacity, Device, ModelShape
    from guardreasoner_vl.recipe import GrpoSection

UTILISATION = 0.4
"""The share of a GPU's peaks that training and generating are taken to reach."""

TYPICAL = Work(prompt=350, completion=ANSWER, image=250, cached=118)
"""A row: tokens of text, of the answer with its reasoning, and of images, on the average of rows with and without."""


@dataclass(frozen=True)
class Machine:
    """`count` GPUs of one kind, the model's shape, and whether all weights are trained or adapters alone."""

    device: Device
    count: int
    shape: ModelShape
    adapters: bool = False

    @property
    def flops(self) -> float:
        """Assumed FLOP/s of one GPU: its peak times `UTILISATION`."""
        return UTILISATION * self.device.flops


def sft_seconds(machine: Machine, rows: float, checkpointing: bool) -> float:
    """Seconds of SFT on `rows` rows, each epoch's counted."""
    return rows * _passes(machine, checkpointing) * group_flops(machine.shape, 1) / machine.flops / machine.count


def answer_seconds(machine: Machine, prompts: float, each: int, at_once: int) -> float:
    """Seconds of one GPU for `each` answers to each of `prompts` prompts, `at_once` answers at a time.

    Raises `EngineError` if the weights and one answer do not fit the GPU.
    """
    fitting = _machine_capacity(machine, at_once)
    return prompts * (fitting.prefill + each * fitting.decode)


def batch_seconds(machine: Machine, section: GrpoSection, at_once: int) -> tuple[float, float]:
    """Seconds of a rollout batch of RL: of its answers and of its updates. Raises `EngineError` as `answer_seconds`."""
    prompts = section.rollout_batch / machine.count
    updates = section.rollout_batch // section.update_batch
    passes = _passes(machine, section.gradient_checkpointing) + (updates - 1) / updates
    flops = prompts * passes * group_flops(machine.shape, section.group_size)
    return answer_seconds(machine, prompts, section.group_size, at_once), flops / machine.flops


def group_flops(shape: ModelShape, answers: int) -> float:
    """FLOPs of a forward pass over a typical prompt and `answers` answers to it, the answers' logits included."""
    prompt = replace(TYPICAL, cached=0)
    tokens, context = TYPICAL.completion, prompt.context + TYPICAL.completion / 2
    of_token = 2 * (shape.matrices + shape.head) + 4 * shape.layers * shape.hidden * context
    return prefill_flops(shape, prompt) - 2 * shape.head + answers * tokens * of_token


def _passes(machine: Machine, checkpointing: bool) -> int:
    """Forward passes that a forward and a backward pass are worth."""
    return (2 if machine.adapters else 3) + checkpointing


def _machine_capacity(machine: Machine, at_once: int) -> Capacity:
    fitting = capacity(machine.shape, machine.device, TYPICAL, UTILISATION, at_once)
    if fitting is None:
        raise EngineError("the weights and one answer do not fit this GPU; plan for one with more memory")
    return fitting
