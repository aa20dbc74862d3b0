"""Image geometry: Qwen2-VL's resizing, merging two images into one, and the limit on aspect ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from guardreasoner_vl.errors import ImageError, InputError

Layout = Literal["side_by_side", "stacked"]
LAYOUTS: tuple[Layout, ...] = ("side_by_side", "stacked")
FACTOR = 28  # a Qwen2-VL image token covers 2 x 2 patches of 14 pixels
MAX_ASPECT = 200.0  # Qwen2-VL refuses thinner images
MERGED_PIXELS = 4_000_000  # a PNG of this many pixels is within the limit on bytes


@dataclass(frozen=True)
class PixelBudget:
    """Area limits in pixels, as Qwen2-VL defines them; sides become multiples of 28. Raises `InputError`."""

    min_pixels: int = 56 * 56
    max_pixels: int = 12_845_056

    def __post_init__(self) -> None:
        if not FACTOR**2 <= self.min_pixels <= self.max_pixels:
            raise InputError(
                f"the pixel budget {self.min_pixels} to {self.max_pixels} is impossible: "
                f"use {FACTOR**2} <= min_pixels <= max_pixels"
            )


def smart_resize(height: int, width: int, budget: PixelBudget, factor: int = FACTOR) -> tuple[int, int]:
    """The (height, width) to which Qwen2-VL resizes an image: multiples of `factor`, area within `budget`.

    The same arithmetic as `transformers.models.qwen2_vl.image_processing_qwen2_vl.smart_resize`.
    Raises `ImageError` if one side is more than 200 times the other.
    """
    check_aspect(height, width, MAX_ASPECT)
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > budget.max_pixels:
        shrink = math.sqrt((height * width) / budget.max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < budget.min_pixels:
        grow = math.sqrt(budget.min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def merge_images(
    first: Image.Image, second: Image.Image, layout: Layout, max_pixels: int = MERGED_PIXELS
) -> Image.Image:
    """Merge two RGB images: side by side at a common height, or the first above the second at a common width.

    The smaller image is enlarged, because shrinking the larger one could lose the small print that its label depends
    on; both are shrunk only if the result would have more than `max_pixels` pixels. Aspect ratios are kept to within a
    pixel; every side has at least one pixel. Raises `ImageError` if the result would be too thin to be judged.
    """
    images = (first, second)
    for image in images:
        check_aspect(image.height, image.width, MAX_ASPECT)
    side_by_side = layout == "side_by_side"
    # Each image's size along the direction of the layout, and across it.
    sizes = [(image.width, image.height) if side_by_side else (image.height, image.width) for image in images]
    aspect = sum(along / across for along, across in sizes)
    across = max(1, min(max(side for _, side in sizes), int(math.sqrt(max_pixels / aspect))))
    lengths = [max(1, along * across // side) for along, side in sizes]
    width, height = (sum(lengths), across) if side_by_side else (across, sum(lengths))
    check_aspect(height, width, MAX_ASPECT)
    merged = Image.new("RGB", (width, height))
    for image, length, start in zip(images, lengths, (0, lengths[0]), strict=True):
        size, place = ((length, across), (start, 0)) if side_by_side else ((across, length), (0, start))
        merged.paste(image.resize(size, Image.Resampling.BICUBIC), place)
    return merged


def check_aspect(height: int, width: int, limit: float) -> None:
    """Raise `ImageError` if one side is zero or more than `limit` times the other."""
    if min(height, width) < 1 or max(height, width) > limit * min(height, width):
        raise ImageError(
            f"the image has {width} x {height} pixels and is too thin: keep its sides within {limit:g} to 1"
        )
