"""Pictures for tests."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from guardreasoner_vl.types import Picture


def picture(width: int, height: int) -> Picture:
    """A picture with something different in every corner."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack((across * 255 // width, down * 255 // height, (across * down) % 256), -1).astype(np.uint8)
    encoded = BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return Picture(encoded.getvalue(), width, height)
