"""Decodes images safely: checks them before decoding, and normalises them to 8-bit RGB.

Every frame is judged, in each of its variants that differ visibly (`images.variants`), which are upright; colour
profiles, gamma, thumbnails and all other metadata are dropped, as model pipelines do. The returned pixels are both
hashed and judged.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from guardreasoner_vl.errors import ImageError, reason_of
from guardreasoner_vl.images.encoded import encoded_bytes
from guardreasoner_vl.images.geometry import MAX_ASPECT, check_aspect
from guardreasoner_vl.images.variants import visible_variants
from guardreasoner_vl.types import CheckedImage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL.ImageFile import ImageFile

    from guardreasoner_vl.types import ImageSource

T = TypeVar("T")
_RESAVE = "save it again as PNG or JPEG"
_FAULTS = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError)
_MAX_JPEG_SCANS = 100  # real files have about 10; each costs a pass over the whole image
_GREYS = {"L;2": 3, "L;4": 15}  # the largest grey of a PNG with fewer than 8 bits


@dataclass(frozen=True)
class ImageLimits:
    """Limits on an image: encoded bytes, pixels of a frame and of all frames, frames, formats, aspect ratio; and on the
    pixels of all frames of all images of an exchange with its history."""

    max_bytes: int = 20_000_000
    max_pixels: int = 40_000_000
    max_total_pixels: int = 100_000_000
    max_exchange_pixels: int = 200_000_000  # 16 photographs of 12 megapixels; if transparent, up to 20 s of decoding
    max_frames: int = 16
    # TIFF is excluded: libtiff brings many codecs, and chat services do not accept it either.
    formats: frozenset[str] = frozenset({"PNG", "JPEG", "WEBP", "GIF", "BMP"})
    max_aspect: float = MAX_ASPECT


DEFAULT_LIMITS = ImageLimits()


class _ScreenBoundGif(GifImageFile):
    """Rejects GIF frames that exceed the GIF's screen: Pillow would enlarge the canvas before its size is checked."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_size" and self.__dict__.get("_size", (0, 0)) not in ((0, 0), value):
            raise ImageError(f"a frame of the GIF extends beyond its screen: {_RESAVE}")
        super().__setattr__(name, value)


class _ScaledKeyPng(PngImageFile):
    """Scales the transparent grey of a PNG of 2 or 4 bits as Pillow scales its pixels: Pillow itself would miss it."""

    def _open(self) -> None:
        super()._open()
        largest = _GREYS.get(self.png.im_rawmode or "") if self.png else None
        if largest and "transparency" in self.info:
            self.info["transparency"] = (self.info["transparency"] & largest) * (255 // largest)


# Chosen by signature instead of `Image.open`, so that no other installed plugin reads the bytes, and so that a JPEG is
# only its main image (the other images of an MPO file are previews, depth and gain maps).
_READERS: dict[str, tuple[bytes, type[ImageFile]]] = {
    "PNG": (b"\x89PNG\r\n\x1a\n", _ScaledKeyPng),
    "JPEG": (b"\xff\xd8\xff", JpegImageFile),
    "WEBP": (b"RIFF", WebPImageFile),
    "GIF": (b"GIF8", _ScreenBoundGif),
    "BMP": (b"BM", BmpImageFile),
}


def file_ending(data: bytes) -> str:
    """The usual file name ending of an image with these bytes, such as `.png`; empty for an unknown format."""
    formats = (name for name, (signature, _) in _READERS.items() if data.startswith(signature))
    return next((f".{name.lower()}" for name in formats), "")


def checked_images(source: ImageSource, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[CheckedImage, ...]:
    """Read a path, encoded bytes, `data:` URL or PIL image into one or more images per frame.

    A frame gives several images if viewers would show it differently (`images.variants`). A PIL image stays at its
    current frame. Raises `ImageError` for anything that cannot be judged completely.
    """
    return (source,) if isinstance(source, CheckedImage) else _each(source, limits, _checked_image)


def decoded_images(source: ImageSource) -> tuple[Image.Image, ...]:
    """The images of `checked_images`, decoded and not encoded again: for reading many files once."""
    return (source.open(),) if isinstance(source, CheckedImage) else _each(source, DEFAULT_LIMITS, _independent_copy)


def pixels_to_decode(source: ImageSource, limits: ImageLimits = DEFAULT_LIMITS) -> int:
    """Pixels of all frames of an image, from its headers: nothing is decoded. Raises `ImageError`.

    An animated GIF counts as one of the most frames, because only reading all of it would tell their number.
    """
    if isinstance(source, CheckedImage):
        return source.width * source.height
    with _pillow_faults():
        image = source if isinstance(source, Image.Image) else _open(encoded_bytes(source, limits.max_bytes), limits)
        _check_size(image.size, limits)
        if isinstance(image, GifImageFile):
            frames = limits.max_frames if image.is_animated else 1
        else:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        return min(image.width * image.height * min(frames, limits.max_frames), limits.max_total_pixels)


def _each(source: ImageSource, limits: ImageLimits, make: Callable[[Image.Image], T]) -> tuple[T, ...]:
    with _pillow_faults():
        if not isinstance(source, Image.Image):
            return tuple(map(make, _visible_images(_open(encoded_bytes(source, limits.max_bytes), limits), limits)))
        if source.format not in (None, "MPO", *limits.formats):
            raise ImageError(f"{source.format} images are not accepted: {_RESAVE}, or pass image.convert('RGB')")
        position = source.tell()
        try:
            return tuple(map(make, _visible_images(source, limits)))
        finally:
            source.seek(position)


@contextmanager
def _pillow_faults() -> Iterator[None]:
    """Convert Pillow's exceptions on bad input into `ImageError`, and suppress its warnings.

    `catch_warnings` is not thread-safe; the filter covers Pillow only, so that a race causes one log line at most.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    except Image.DecompressionBombError as error:
        raise ImageError("the image has far too many pixels: shrink it") from error
    except (*_FAULTS, struct.error, zlib.error, Warning) as error:
        raise ImageError(f"the image cannot be decoded ({reason_of(error, 100)}): {_RESAVE}") from error


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    for name in limits.formats & _READERS.keys():
        signature, reader = _READERS[name]
        if data.startswith(signature):
            _refuse_traps(name, data, limits)
            return reader(BytesIO(data))
    raise ImageError(f"the file is not a {', '.join(sorted(limits.formats))} image: convert it to one of these formats")


def _refuse_traps(name: str, data: bytes, limits: ImageLimits) -> None:
    """Reject files that exploit Pillow: huge GIF screens, JPEGs with over 100 scans, run-length encoded BMPs, and PNGs
    whose header is broken or whose transparent colour Pillow would miss or is given twice."""
    if name == "GIF":
        _check_size(struct.unpack_from("<HH", data, 6), limits)
    elif name == "JPEG" and data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise ImageError(f"the JPEG has more than {_MAX_JPEG_SCANS} scans: {_RESAVE}")
    elif name == "PNG" and (data[12:16] != b"IHDR" or (data[24:26] == b"\x10\x02" and b"tRNS" in data)):
        # Pillow compares the 16-bit colour key with 8-bit colours, so it would show other pixels than browsers.
        raise ImageError(f"the PNG has a broken header, or 16-bit colours with a transparent colour: {_RESAVE}")
    elif name == "PNG" and data.count(b"tRNS") > 1:  # Pillow takes the last, browsers the first
        raise ImageError(f"the PNG has more than one transparent colour: {_RESAVE}")
    elif name == "BMP" and data[30:31] in (b"\x01", b"\x02"):  # run-length decoding is a loop in Python
        raise ImageError(f"run-length encoded BMP is not accepted: {_RESAVE}")


def _check_size(size: tuple[int, ...], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageError(f"the image has {width} x {height} pixels, more than {limits.max_pixels:,}: shrink it")
    check_aspect(height, width, limits.max_aspect)


def _decoded_frames(image: Image.Image, limits: ImageLimits) -> Iterator[Image.Image]:
    """Yield `image` at each of its frames, decoded. Checks a frame's size before decoding it."""
    total = 0
    for index in count():
        if image.format == "MPO" and index:
            return
        try:
            image.seek(index)
        except EOFError:
            return
        if index >= limits.max_frames:
            raise ImageError(f"the image has more than {limits.max_frames} frames: send fewer frames")
        _check_size(image.size, limits)
        total += image.width * image.height
        if total > limits.max_total_pixels:
            raise ImageError(f"the frames have more than {limits.max_total_pixels:,} pixels in total: shrink the image")
        image.load()
        yield image


def _visible_images(image: Image.Image, limits: ImageLimits) -> Iterator[Image.Image]:
    for frame in _decoded_frames(image, limits):
        yield from visible_variants(frame)


def _independent_copy(rgb: Image.Image) -> Image.Image:
    image = rgb.copy()  # Pillow yields the frames of a file as one object
    image.info.clear()
    return image


def _checked_image(rgb: Image.Image) -> CheckedImage:
    rgb.info.clear()  # otherwise the PNG would keep the colour profile
    buffer = BytesIO()
    rgb.save(buffer, "PNG", compress_level=1)
    return CheckedImage(buffer.getvalue(), rgb.width, rgb.height)
