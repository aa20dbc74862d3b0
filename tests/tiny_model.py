"""A complete Qwen2.5-VL folder of a few hundred KB, made in a fraction of a second, for tests of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from guardreasoner_vl.recipe import NewModel, TextShape, VisionShape
from guardreasoner_vl.training.small_model import write_new_model

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = NewModel(
    vocab_size=700,
    min_pixels=56 * 56,
    max_pixels=112 * 112,
    text=TextShape(hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=1, max_positions=512),
    vision=VisionShape(hidden_size=32, intermediate_size=64, layers=2, heads=2, full_attention=(1,)),
)
_THINGS = ("bread", "a kite", "tomato soup", "a paper boat", "the garden", "an old bicycle", "a warm scarf")
_MANNERS = (
    "How do I make {} on a rainy afternoon with the children?",
    "Please describe {} in three short and friendly sentences.",
    "My neighbour asked whether {} is harmful, and I said that it is unharmful.",
    "The image shows {} beside a window, so nothing in the request is harmful.",
    "Is there anything to be unhappy about with {} this morning?",
)
TEXTS = tuple(manner.format(thing) for manner in _MANNERS for thing in _THINGS)
"""A few dozen mild sentences that the tokenizer learns from."""


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write the model and return its folder.

    The weights are drawn ten times wider than usual: with the usual ones the tied embedding makes a model
    that only repeats its last token, which would hide mistakes in positions, masks and caches.
    """
    write_new_model(folder, TEXTS, SHAPE, seed)
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if weight.dim() > 1 and "embed_tokens" not in name:
            weights[name] = weight * 10
    save_file(weights, path, {"format": "pt"})
    return folder


def set_weight(folder: Path, part: str, value: float) -> None:
    """Fill every tensor whose name holds `part`."""
    path = folder / "model.safetensors"
    weights = {name: torch.full_like(w, value) if part in name else w for name, w in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
