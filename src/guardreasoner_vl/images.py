"""The safe intake of pictures: checked before decoding, normalised, resized as Qwen2-VL defines it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PixelBudget:
    """Area limits in pixels, as Qwen2-VL defines them; sides become multiples of 28."""

    min_pixels: int = 56 * 56
    max_pixels: int = 12_845_056


@dataclass(frozen=True)
class Picture:
    """One checked and normalised picture: PNG bytes of an RGB image, and its size in pixels."""

    png: bytes
    width: int
    height: int
