"""Checks and decodes the images of an exchange."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import ImageLimits, checked_images

if TYPE_CHECKING:
    from guardreasoner_vl.types import CheckedImage, Exchange, Turn

_VARIANTS = 3
"""Variants of one frame that the limit on images allows for: over white, over black, without transparency."""


def checked_exchange(
    exchange: Exchange, limits: ImageLimits | None = None
) -> tuple[Exchange, tuple[CheckedImage, ...]]:
    """The exchange with a separate `CheckedImage` for each variant of each frame, and all images in reading order.

    The limit on frames applies to the whole conversation; each frame may have three variants. Raises `ImageError`.
    """
    limits = limits or ImageLimits()
    max_images = limits.max_frames * _VARIANTS
    images: list[CheckedImage] = []

    def check_images(turn: Turn) -> tuple[CheckedImage, ...]:
        before = len(images)
        for image in turn.images:
            images.extend(checked_images(image, limits))
            if len(images) > max_images:
                raise ImageError(f"the conversation has more than {max_images} images in total: send fewer images")
        return tuple(images[before:])

    history = tuple(replace(turn, images=check_images(turn)) for turn in exchange.history)
    return replace(exchange, images=check_images(exchange), history=history), tuple(images)
