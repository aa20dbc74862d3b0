"""Images for tests."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from guardreasoner_vl.types import CheckedImage


def image(width: int, height: int) -> CheckedImage:
    """An image with something different in every corner."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack((across * 255 // width, down * 255 // height, (across * down) % 256), -1).astype(np.uint8)
    encoded = BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return CheckedImage(encoded.getvalue(), width, height)
