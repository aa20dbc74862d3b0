"""Checks and decodes the images of an exchange."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import ImageLimits, checked_images

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.images.sizes import ImageSize, ImageSizes
    from guardreasoner_vl.types import CheckedImage, Exchange, ImageSource, Turn

_VARIANTS = 3
"""Variants of one frame that the limit on images allows for: over white, over black, without transparency."""

ImageT = TypeVar("ImageT")


def checked_exchange(
    exchange: Exchange, limits: ImageLimits | None = None
) -> tuple[Exchange, tuple[CheckedImage, ...]]:
    """The exchange with a separate `CheckedImage` for each variant of each frame, and all images in reading order.

    The limit on frames applies to the whole conversation; each frame may have three variants. Raises `ImageError`.
    """
    return _read(exchange, limits or ImageLimits(), checked_images)


def measured_exchange(exchange: Exchange, sizes: ImageSizes) -> tuple[Exchange, tuple[ImageSize, ...]]:
    """`checked_exchange` with sizes alone instead of images: enough to count tokens. Raises `ImageError`."""
    return _read(exchange, ImageLimits(), lambda image, _: sizes.of(image))


def _read(
    exchange: Exchange, limits: ImageLimits, read: Callable[[ImageSource, ImageLimits], tuple[ImageT, ...]]
) -> tuple[Exchange, tuple[ImageT, ...]]:
    max_images = limits.max_frames * _VARIANTS
    images: list[ImageT] = []

    def read_images(turn: Turn) -> tuple[Any, ...]:
        before = len(images)
        for image in turn.images:
            images.extend(read(image, limits))
            if len(images) > max_images:
                raise ImageError(f"the conversation has more than {max_images} images in total: send fewer images")
        return tuple(images[before:])

    history = tuple(replace(turn, images=read_images(turn)) for turn in exchange.history)
    return replace(exchange, images=read_images(exchange), history=history), tuple(images)
