"""Averaged weights: the mean by hand, what is copied, and what is refused."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from guardreasoner_vl.errors import InputError, ModelError
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.training.averaging import average
from guardreasoner_vl.training.compact import compact
from tests.cli.test_app import invoke

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture
def after(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with every weight doubled."""
    folder = shutil.copytree(tiny_model, tmp_path / "after")
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_mean_by_hand(tiny_model: Path, after: Path, tmp_path: Path) -> None:
    average(tiny_model, after, 0.25, tmp_path / "mean")
    before, mean = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "mean"))
    assert before.keys() == mean.keys()
    for name, value in before.items():
        assert torch.equal(mean[name], (1.25 * value.float()).to(torch.bfloat16))
    with Guard.load(str(tmp_path / "mean")) as guard:
        assert guard.moderate("How do I bake bread?").usage.completion_tokens > 0


def test_on_the_command_line(tiny_model: Path, after: Path, tmp_path: Path) -> None:
    out = tmp_path / "mean"
    done, again = (invoke("average", tiny_model, after, "--share", "0.6", "--out", out) for _ in range(2))
    assert (done.exit_code, done.stdout.strip()) == (0, str(out))
    assert again.exit_code != 0
    assert "exists already" in again.stderr


def test_what_cannot_be_averaged(tiny_model: Path, after: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a share of 1\.5: give a number from 0 to 1"):
        average(tiny_model, after, 1.5, tmp_path / "mean")
    compact(tiny_model, tmp_path / "small")
    with pytest.raises(ModelError, match="stored as int8; `guardreasoner-vl compact --expand` gives bf16"):
        average(tmp_path / "small", after, 0.5, tmp_path / "mean")
    weights = load_file(after / "model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name][:1].clone()}, after / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"differ in the shape of 1 weights .*give the same model before and after"):
        average(tiny_model, after, 0.5, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
