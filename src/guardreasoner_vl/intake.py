"""From an exchange as the caller gave it to one whose pictures are checked and counted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from guardreasoner_vl.images import ImageLimits, Picture, load_pictures

if TYPE_CHECKING:
    from guardreasoner_vl.types import Exchange, Turn


def take_in(exchange: Exchange, limits: ImageLimits | None = None) -> tuple[Exchange, tuple[Picture, ...]]:
    """The exchange with every frame as a picture of its own, and all pictures in reading order.

    The limit on frames holds for the whole conversation. Raises `ImageError`.
    """
    limits = limits or ImageLimits()
    history = tuple(_taken_in(turn, limits) for turn in exchange.history)
    last = _taken_in(exchange, limits)
    taken = replace(exchange, images=last.images, history=history)
    pictures = tuple(picture for picture in taken.all_images if isinstance(picture, Picture))
    return taken, pictures


def _taken_in(turn: Turn, limits: ImageLimits) -> Turn:
    pictures = tuple(picture for image in turn.images for picture in load_pictures(image, limits))
    return replace(turn, images=pictures)
