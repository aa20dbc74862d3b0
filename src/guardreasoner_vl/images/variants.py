"""What different viewers see in one image.

A file can look different to different viewers, and an attacker picks the one that the guard does not use.
So an image is judged in each of its readings that differ visibly:

- transparency: over white, over black, and with the alpha channel ignored (what `Image.convert("RGB")`, and
  so most model pipelines, see);
- more than 8 bits per channel: scaled to 8 bits, and cut off at 255 (again what `convert("RGB")` does).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops

from guardreasoner_vl.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_VISIBLE = 9  # of 255: two readings that differ by less in every channel look the same


def visible_readings(image: Image.Image) -> Iterator[Image.Image]:
    """`image` as 8-bit RGB, once for each way it visibly looks. Raises `ImageError`."""
    readings: list[Image.Image] = []
    for eight_bit in _depths(image):
        for reading in _composites(eight_bit):
            if not any(_looks_like(reading, earlier) for earlier in readings):
                readings.append(reading)
                yield reading


def _depths(image: Image.Image) -> list[Image.Image]:
    """`image` with 8 bits per channel: once, or scaled and cut off where it has more."""
    if image.mode == "F":
        return [_from_float(image)]
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return [image]
    values = np.asarray(image.convert("I"))
    if values.min() < 0 or values.max() > 65_535:
        raise ImageError("the image has values outside 0 to 65535: convert it to 8 bits")
    opaque = values != image.info.get("transparency")
    readings = [Image.fromarray(v.astype(np.uint8)) for v in ((values + 128) // 257, np.minimum(values, 255))]
    if not opaque.all():
        for reading in readings:
            reading.putalpha(Image.fromarray(opaque))
    return readings


def _from_float(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= 255):  # false for NaN too
        raise ImageError("the image has values outside 0 to 255, or not a number: convert it to 8 bits")
    return Image.fromarray(np.rint(values * (255 if values.max() <= 1 else 1)).astype(np.uint8))


def _composites(image: Image.Image) -> Iterator[Image.Image]:
    """`image` as RGB: over white, over black and with its alpha channel ignored; once if it is opaque."""
    if image.mode in ("P", "PA") and image.palette is None:
        raise ImageError("the image has no palette: save it again as PNG or JPEG")
    if not image.has_transparency_data:
        yield image.convert("RGB")
        return
    if image.mode != "RGBA":
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    colours, alpha = image.convert("RGB"), image.getchannel("A")
    if alpha.histogram()[255] < image.width * image.height:
        for background in ("white", "black"):
            ground = Image.new("RGB", image.size, background)
            ground.paste(colours, mask=alpha)
            yield ground
    yield colours


def _looks_like(one: Image.Image, other: Image.Image) -> bool:
    differences = np.reshape(ImageChops.difference(one, other).histogram(), (3, 256))
    return not differences[:, _VISIBLE:].any()
