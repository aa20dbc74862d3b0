"""Checks and decodes the images of an exchange."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import DEFAULT_LIMITS, ImageLimits, checked_images, pixels_to_decode
from guardreasoner_vl.images.encoded import in_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from guardreasoner_vl.images.sizes import ImageSize, ImageSizes
    from guardreasoner_vl.types import CheckedImage, Exchange, ImageSource, Turn

_VARIANTS = 3
"""Variants of one frame that the limit on images allows for: over white, over black, without transparency."""

ImageT = TypeVar("ImageT")


def checked_exchange(
    exchange: Exchange, limits: ImageLimits | None = None
) -> tuple[Exchange, tuple[CheckedImage, ...]]:
    """The exchange with a separate `CheckedImage` for each variant of each frame, and all images in reading order.

    The limit on frames applies to the whole conversation; each frame may have three variants. The pixels of all images
    are counted before the first is decoded; a file is read once for both, and its bytes are kept until it is decoded.
    Raises `ImageError`.
    """
    limits = limits or DEFAULT_LIMITS
    _check_count(len(exchange.all_images), limits)
    sources: deque[ImageSource] = deque()

    def pixels() -> Iterator[int]:
        for image in exchange.all_images:
            sources.append(in_memory(image, limits.max_bytes))
            yield pixels_to_decode(sources[-1], limits)

    def read(_: ImageSource, limits: ImageLimits) -> tuple[CheckedImage, ...]:
        return checked_images(sources.popleft(), limits)  # `_read_all` reads in the order of `all_images`

    _check_pixels(pixels(), limits)
    return _read_all(exchange, limits, read)


def measured_exchange(exchange: Exchange, sizes: ImageSizes) -> tuple[Exchange, tuple[ImageSize, ...]]:
    """`checked_exchange` with sizes instead of images, which suffice to count tokens. Raises `ImageError`.

    The limit on pixels is stricter than that of `checked_exchange`, because it counts every variant of a frame.
    """
    measured, images = _read_all(exchange, DEFAULT_LIMITS, lambda image, _: sizes.of(image))
    _check_pixels((image.width * image.height for image in images), DEFAULT_LIMITS)
    return measured, images


def _check_pixels(pixels: Iterable[int], limits: ImageLimits) -> None:
    if any(total > limits.max_exchange_pixels for total in accumulate(pixels)):
        raise ImageError(
            f"the conversation's images have more than {limits.max_exchange_pixels:,} pixels in total: "
            "send fewer or smaller images"
        )


def _check_count(images: int, limits: ImageLimits) -> None:
    if images > (most := limits.max_frames * _VARIANTS):
        raise ImageError(f"the conversation has more than {most} images in total: send fewer images")


def _read_all(
    exchange: Exchange, limits: ImageLimits, read: Callable[[ImageSource, ImageLimits], tuple[ImageT, ...]]
) -> tuple[Exchange, tuple[ImageT, ...]]:
    images: list[ImageT] = []

    def read_images(turn: Turn) -> tuple[Any, ...]:
        before = len(images)
        for image in turn.images:
            images.extend(read(image, limits))
            _check_count(len(images), limits)
        return tuple(images[before:])

    history = tuple(replace(turn, images=read_images(turn)) for turn in exchange.history)
    return replace(exchange, images=read_images(exchange), history=history), tuple(images)
