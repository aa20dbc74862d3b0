"""From an exchange as the caller gave it to one whose images are checked and counted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import ImageLimits, checked_images

if TYPE_CHECKING:
    from guardreasoner_vl.types import CheckedImage, Exchange, Turn

_READINGS = 3
"""Readings of one frame that the limit has room for: over white, over black, without transparency."""


def checked_exchange(
    exchange: Exchange, limits: ImageLimits | None = None
) -> tuple[Exchange, tuple[CheckedImage, ...]]:
    """The exchange with every frame as an image of its own, and all images in reading order.

    The limit on frames holds for the whole conversation, with room for each frame's readings. Raises `ImageError`.
    """
    limits = limits or ImageLimits()
    most = limits.max_frames * _READINGS
    images: list[CheckedImage] = []

    def taken_in(turn: Turn) -> tuple[CheckedImage, ...]:
        before = len(images)
        for image in turn.images:
            images.extend(checked_images(image, limits))
            if len(images) > most:
                raise ImageError(f"the conversation has more than {most} images in all: send those that matter")
        return tuple(images[before:])

    history = tuple(replace(turn, images=taken_in(turn)) for turn in exchange.history)
    return replace(exchange, images=taken_in(exchange), history=history), tuple(images)
