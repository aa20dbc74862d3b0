"""One call for all windows gives what transformers' one call for each window gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from guardreasoner_vl.engines.qwen import QwenInputs
from guardreasoner_vl.recipe import NewModel
from guardreasoner_vl.training.model_folder import load_for_training
from guardreasoner_vl.training.small_model import write_new_model
from guardreasoner_vl.training.vision_attention import AttentionWindows, use_one_call
from tests.training import toy

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "sizes",
    [((224, 224),), ((224, 140), (56, 56), (196, 252)), ((28, 28), (112, 112)), ((224, 224), (28, 28), (28, 28))],
)
def test_features_and_gradients_are_the_same(sizes: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    write_new_model(
        tmp_path, [" how to bake a cake"] * 20, NewModel.model_validate({**toy.SHAPE, "max_pixels": 224 * 224}), seed=0
    )
    inputs = QwenInputs.from_folder(tmp_path)
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    grids = torch.tensor([(1, *inputs.grid(image.height, image.width)) for image in images])
    pixels = torch.from_numpy(inputs.patches(images))
    results = []
    for one_call in (False, True):
        tower = load_for_training(tmp_path, "fp32").model.visual
        if one_call:
            use_one_call(tower)
        features = tower(pixels, grid_thw=grids).pooler_output
        features.square().mean().backward()
        gradients = [parameter.grad for parameter in tower.parameters()]
        results.append([features.detach(), *gradients])
    for stock, patched in zip(*results, strict=True):
        assert torch.allclose(stock, patched, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "padded"), [([64, 64, 32], True), ([8, 8], True), ([1000, 10, 10, 10], False), ([100, 60, 60], True)]
)
def test_windows_of_very_unlike_lengths_are_not_padded(lengths: list[int], padded: bool) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    assert (AttentionWindows.of(bounds) is not None) is padded
