"""Reads an exchange's image files into the exchange, so that another machine can judge it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import DEFAULT_LIMITS
from guardreasoner_vl.images.encoded import encoded_bytes

if TYPE_CHECKING:
    from guardreasoner_vl.types import Exchange, ImageSource


def portable_exchange(exchange: Exchange) -> Exchange:
    """The exchange with its images' bytes. A file that cannot be read stays a path: judging reports it."""
    history = tuple(replace(turn, images=tuple(map(_portable, turn.images))) for turn in exchange.history)
    return replace(exchange, images=tuple(map(_portable, exchange.images)), history=history)


def _portable(image: ImageSource) -> ImageSource:
    if not isinstance(image, (str, Path)):
        return image
    try:
        return encoded_bytes(image, DEFAULT_LIMITS.max_bytes)
    except ImageError:
        return image
