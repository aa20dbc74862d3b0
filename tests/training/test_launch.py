"""Several GPUs need a launcher: every way to train refuses them without one, before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from guardreasoner_vl.errors import GuardError, RecipeError
from guardreasoner_vl.pipeline import run as pipeline
from guardreasoner_vl.pipeline.run import STAGES, Run
from guardreasoner_vl.recipe import SftSection
from guardreasoner_vl.stages import grpo, sft
from guardreasoner_vl.training.launch import check_launch, process_count
from guardreasoner_vl.training.sft_trainer import sft_config
from tests.smoke import short_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REFUSAL = r"4 GPUs are visible .* `accelerate launch --num_processes 4 .* set CUDA_VISIBLE_DEVICES=0"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of visible GPUs; no launcher started this process."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    "train",
    [
        lambda out: sft.run(short_recipe(), out, out),
        lambda out: grpo.run(short_recipe(), out, out, out),
        lambda out: pipeline.run(Run(short_recipe(), out, out, print), STAGES),
    ],
    ids=["sft", "grpo", "run"],
)
def test_several_gpus_without_a_launcher_are_refused(
    train: Callable[[Path], object], gpus: Callable[[int], None], tmp_path: Path
) -> None:
    gpus(4)
    with pytest.raises(GuardError, match=REFUSAL) as caught:
        train(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_gpu_or_a_launcher_is_accepted(gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (0, 1):
        gpus(count)
        check_launch()
    gpus(4)
    with pytest.raises(GuardError, match=REFUSAL):
        check_launch()
    monkeypatch.setenv("LOCAL_RANK", "2")
    check_launch()


def test_a_total_batch_is_shared_by_the_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    section = SftSection(total_batch=192, gradient_accumulation=3, precision="fp32")
    for count, passes in ((1, 32), (4, 8), (8, 4)):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        assert process_count() == count
        assert section.accumulated(process_count()) == passes
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(RecipeError, match=r"sft\.total_batch 192 is not a multiple of 6 rows .* on 5 devices"):
        sft_config(section, tmp_path, seed=0, use_cpu=True)
    monkeypatch.delenv("WORLD_SIZE")
    assert sft_config(section, tmp_path, seed=0, use_cpu=True).gradient_accumulation_steps == 32
    assert section.model_copy(update={"total_batch": None}).accumulated(5) == 3
