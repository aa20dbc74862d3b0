"""The variants of an image that different viewers show.

Viewers can show one file differently, and an attacker can target a viewer that differs from the guard. An image is
therefore judged in each of its variants that differ visibly:

- orientation: upright, and as it is stored if viewers disagree. They do if it is mirrored, because many ignore it and
  hardly any camera mirrors; and if it is stated outside of the EXIF block, in XMP or text, where Pillow finds it and
  few others do. An EXIF rotation, which every phone writes, is applied and gives no second variant;
- transparency: over white, over black, and with the alpha channel ignored (as `Image.convert("RGB")`, and so most model
  pipelines, do);
- more than 8 bits per channel: scaled to 8 bits, and clipped at 255 (again as `convert("RGB")` does).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops

from guardreasoner_vl.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MIRRORED = (2, 4, 5, 7)
_VISIBLE = 9  # of 255: two variants that differ by less in every channel look the same


def visible_variants(image: Image.Image) -> Iterator[Image.Image]:
    """Yield `image` as 8-bit RGB, once for each visibly different variant. Raises `ImageError`."""
    variants: list[Image.Image] = []
    for turned in _orientations(image):
        for eight_bit in _depths(turned):
            for variant in _composites(eight_bit):
                if not any(_looks_like(variant, earlier) for earlier in variants):
                    variants.append(variant)
                    yield variant


def _orientations(image: Image.Image) -> Iterator[Image.Image]:
    """Yield `image` upright, and as it is stored if viewers disagree about its orientation."""
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    upright = _UPRIGHT.get(orientation)
    if upright is not None:
        yield image.transpose(upright)
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        if orientation not in _MIRRORED and orientation == exif.get(_ORIENTATION_TAG):
            return
    yield image


def _depths(image: Image.Image) -> list[Image.Image]:
    """`image` with 8 bits per channel: unchanged, or scaled and clipped if it has more bits."""
    if image.mode == "F":
        return [_from_float(image)]
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return [image]
    values = np.asarray(image.convert("I"))
    if values.min() < 0 or values.max() > 65_535:
        raise ImageError("the image has values outside 0 to 65535: convert it to 8 bits")
    opaque = values != image.info.get("transparency")
    variants = [Image.fromarray(v.astype(np.uint8)) for v in ((values + 128) // 257, np.minimum(values, 255))]
    if not opaque.all():
        for variant in variants:
            variant.putalpha(Image.fromarray(opaque))
    return variants


def _from_float(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= 255):  # also false for NaN
        raise ImageError("the image has values that are outside 0 to 255 or not numbers: convert it to 8 bits")
    return Image.fromarray(np.rint(values * (255 if values.max() <= 1 else 1)).astype(np.uint8))


def _composites(image: Image.Image) -> Iterator[Image.Image]:
    """Yield `image` as RGB: over white, over black and with its alpha channel ignored; only once if it is opaque."""
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
            composite = Image.new("RGB", image.size, background)
            composite.paste(colours, mask=alpha)
            yield composite
    yield colours


def _looks_like(first: Image.Image, second: Image.Image) -> bool:
    if first.size != second.size:
        return False
    differences = np.reshape(ImageChops.difference(first, second).histogram(), (3, 256))
    return not differences[:, _VISIBLE:].any()
