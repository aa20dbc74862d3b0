"""The plan's memory beside the bytes of the tensors that live in a small run, within 15%."""

from __future__ import annotations

import pytest

from benchmarks.training_memory import ARMS, measure

pytestmark = pytest.mark.slow
CHECKED = ("SFT", "SFT, several GPUs", "SFT, LoRA", "RL, checkpointing", "RL, sharded", "RL, LoRA, checkpointing")
"""Of `ARMS` those without bf16, which takes minutes on a CPU that emulates it, and without rollouts."""


@pytest.mark.parametrize("name", CHECKED)
def test_planned_is_measured(name: str) -> None:
    figures = measure(next(arm for arm in ARMS if arm.name == name))
    assert figures.planned == pytest.approx(figures.measured, rel=0.15)
    # What an update adds to what is held between two of them.
    assert figures.planned - figures.resident == pytest.approx(figures.measured - figures.resident, rel=0.25)
