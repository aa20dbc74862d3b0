"""From an exchange as the caller gave it to one whose pictures are checked and counted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import ImageLimits, load_pictures

if TYPE_CHECKING:
    from guardreasoner_vl.types import Exchange, Picture, Turn

_READINGS = 3
"""Readings of one frame that the limit has room for: over white, over black, without transparency."""


def take_in(exchange: Exchange, limits: ImageLimits | None = None) -> tuple[Exchange, tuple[Picture, ...]]:
    """The exchange with every frame as a picture of its own, and all pictures in reading order.

    The limit on frames holds for the whole conversation, with room for each frame's readings. Raises `ImageError`.
    """
    limits = limits or ImageLimits()
    most = limits.max_frames * _READINGS
    pictures: list[Picture] = []

    def taken_in(turn: Turn) -> tuple[Picture, ...]:
        before = len(pictures)
        for image in turn.images:
            pictures.extend(load_pictures(image, limits))
            if len(pictures) > most:
                raise ImageError(f"the conversation has more than {most} pictures in all: send those that matter")
        return tuple(pictures[before:])

    history = tuple(replace(turn, images=taken_in(turn)) for turn in exchange.history)
    return replace(exchange, images=taken_in(exchange), history=history), tuple(pictures)
