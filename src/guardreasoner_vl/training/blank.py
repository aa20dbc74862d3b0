"""The blank image of a batch without images: with sharded weights every rank has to call every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from guardreasoner_vl.engines.qwen import IMAGE_PAD
from guardreasoner_vl.rl.shared_prefix import Branch

if TYPE_CHECKING:
    from guardreasoner_vl.engines.qwen import QwenInputs

BLANK = 28
"""Width and height of the blank image in pixels, before the model's limits on images."""


def blank_image() -> Image.Image:
    """A black image."""
    return Image.new("RGB", (BLANK, BLANK))


def blank_branch(inputs: QwenInputs, start: int = 0) -> Branch:
    """The image pads of the blank image, at positions from `start` on."""
    grid = inputs.grid(BLANK, BLANK)
    ids = [inputs.token_id[IMAGE_PAD]] * inputs.pads(grid)
    return Branch(ids, start + inputs.positions(ids, [grid]))
