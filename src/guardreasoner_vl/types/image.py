"""A checked and normalised image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class CheckedImage:
    """One checked and normalised image: PNG bytes of an RGB image, and its size in pixels."""

    png: bytes
    width: int
    height: int

    def open(self) -> Image.Image:
        """The decoded RGB image."""
        from PIL.PngImagePlugin import PngImageFile

        image = PngImageFile(BytesIO(self.png))
        image.load()
        return image

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the size and the RGB bytes in hexadecimal; independent of the PNG encoder."""
        return hashlib.sha256(b"%dx%d:" % (self.width, self.height) + self.open().tobytes()).hexdigest()
