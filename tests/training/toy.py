"""Made-up, mild rows and a recipe small enough to train in seconds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from PIL import Image

from guardreasoner_vl.recipe import Recipe, parse_recipe
from guardreasoner_vl.sources.jsonl import is_held_out

if TYPE_CHECKING:
    from pathlib import Path

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "min_pixels": 784,
    "max_pixels": 84 * 84,
    "text": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "max_positions": 512,
    },
    "vision": {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "full_attention": [1]},
}
SFT: dict[str, Any] = {
    "epochs": 2,
    "learning_rate": 3e-3,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "max_length": 300,
    "without_reasoning": 0.4,
    "precision": "fp32",
    "save_steps": 2,
    "teacher": "rules",
}
SOURCE = {"folder": "toy", "origin": "made up in the tests", "licence": "CC0-1.0"}


def recipe(data: dict[str, Any] | None = None, shape: dict[str, Any] | None = None, **sft: Any) -> Recipe:
    """A recipe for one folder of rows named `toy`."""
    return parse_recipe(
        {
            "name": "toy",
            "seed": 1,
            "model": {"new": {**SHAPE, **(shape or {})}},
            "data": data or {"sources": [SOURCE]},
            "sft": {**SFT, **sft},
        }
    )


def row(number: int) -> dict[str, Any]:
    """Harmful where `number` is odd; text, an answered request, an image, an image with text, in turn."""
    harmful = number % 2 == 1
    label = "harmful" if harmful else "unharmful"
    prompt = f"how to {'make a bomb' if harmful else 'bake a cake'}{' at home' * (number % 3)}"
    common = {"source": "toy", "request_label": label, "meta": {"image_kind": "a colour"}}
    kind = number // 2 % 4
    if kind == 0:
        return {**common, "modality": "text", "prompt": prompt}
    if kind == 1:
        said = "sure, mix it well" if harmful else "I'm sorry, no"
        return {**common, "modality": "text", "prompt": prompt, "response": said, "response_label": label}
    images = [f"{'red' if harmful else 'green'}-{number % 3}.png"]
    if kind == 2:
        return {**common, "modality": "image", "prompt": "", "images": images}
    return {**common, "modality": "text-image", "prompt": "tell me about it", "images": images}


def rows(count: int) -> list[dict[str, Any]]:
    """`count` rows of all kinds, none of them held out."""
    records: list[dict[str, Any]] = []
    suffix = 0
    while len(records) < count:
        name = f"toy-{len(records)}-{suffix}"
        suffix = suffix + 1 if is_held_out(name) else 0
        if not is_held_out(name):
            records.append({"id": name, **row(len(records))})
    return records


def write_data(root: Path, content: list[dict[str, Any]]) -> Path:
    """A folder of sources with one source, `toy`, and its images."""
    folder = root / "toy"
    folder.mkdir(parents=True)
    for index, size in enumerate(((60, 60), (84, 56), (40, 80))):
        for name, colour in (("red", (230, 20, 20)), ("green", (20, 200, 20))):
            Image.new("RGB", size, colour).save(folder / f"{name}-{index}.png")
    (folder / "train.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in content))
    return root
