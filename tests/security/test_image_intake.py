"""Hostile images end in one line that names the remedy: no crash, no warning, no memory spent."""

from __future__ import annotations

import base64
import os
import struct
import subprocess
import sys
import warnings
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import ImageLimits, checked_images, pixels_to_decode
from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.types import CheckedImage, Exchange, Turn

if TYPE_CHECKING:
    from guardreasoner_vl.types import ImageSource

MEGABYTE = 1_000_000


def encode(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", side: int = 24) -> Image.Image:
    values = np.random.default_rng(side).integers(0, 256, (side, side, 4), np.uint8)
    return Image.fromarray(values).convert(mode)


def animation(format_name: str, frames: int, mode: str = "RGB", side: int = 8, **options: Any) -> bytes:
    plain = [Image.new("RGB", (side, side), (5 * index, 255 - 5 * index, 7)) for index in range(frames)]
    images = [image.quantize(2) if mode == "P" else image.convert(mode) for image in plain]
    return encode(images[0], format_name, save_all=True, append_images=images[1:], **options)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(width: int, height: int, header: bytes, pixels: bytes, *extra: bytes) -> bytes:
    ihdr = chunk(b"IHDR", struct.pack(">II", width, height) + header)
    return b"\x89PNG\r\n\x1a\n" + ihdr + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


GREY, RGB16 = b"\x08\0\0\0\0", b"\x10\2\0\0\0"


@cache
def zeros(count: int) -> bytes:
    """`count` zero bytes, compressed without being held in memory."""
    packer = zlib.compressobj(9)
    whole, rest = divmod(count, MEGABYTE)
    return b"".join(
        [*(packer.compress(bytes(MEGABYTE)) for _ in range(whole)), packer.compress(bytes(rest)), packer.flush()]
    )


def bomb_png() -> bytes:
    return raw_png(19_000, 19_000, GREY, zeros(19_000 * 19_001))


def bomb_chunk(kind: bytes, prefix: bytes) -> bytes:
    return raw_png(1, 1, GREY, zlib.compress(b"\0\0"), chunk(kind, prefix + zeros(1000 * MEGABYTE)))


def growing_gif() -> bytes:
    """A GIF whose second frame claims 13,000 x 13,000 pixels on a screen of 8 x 8, with disposal to background."""
    data = bytearray(animation("GIF", 2, "P", disposal=2))
    at = data.rindex(b",\0\0\0\0\x08\0\x08\0")
    data[at + 5 : at + 9] = struct.pack("<HH", 13_000, 13_000)
    return bytes(data)


def wide_gif() -> bytes:
    data = bytearray(encode(noise("P"), "GIF"))
    data[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(data)


def filled_gif() -> bytes:
    """A GIF frame as large as its screen, 13,000 x 12,500 pixels, with disposal: Pillow fills it on opening."""
    data = bytearray(animation("GIF", 2, "P", disposal=2))
    size = struct.pack("<HH", 13_000, 12_500)
    at = data.index(b",\0\0\0\0\x08\0\x08\0")
    data[6:10] = data[at + 5 : at + 9] = size
    return bytes(data)


def many_scans() -> bytes:
    data = encode(noise(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 200 + data[-2:]


def rle_bmp() -> bytes:
    data = bytearray(encode(noise("P"), "BMP"))
    data[30] = 1
    return bytes(data)


HOSTILE: dict[str, tuple[ImageSource, str]] = {
    "no bytes": (b"", "is empty"),
    "text": (b"hello", "not a BMP, GIF, JPEG, PNG, WEBP image: convert"),
    "a format that is not let in": (encode(noise(), "TIFF"), "convert it to one of these"),
    "a script": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "convert it to one of these"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "convert it to one of these"),
    "a sound": (b"RIFF\0\0\0\0WAVEfmt ", "save it again"),
    "truncated JPEG": (encode(noise(), "JPEG")[:-300], "truncated.*save it again"),
    "truncated PNG": (encode(noise(), "PNG")[:-300], "save it again"),
    "truncated GIF": (encode(noise("P"), "GIF")[:-300], "save it again"),
    "truncated WebP": (encode(noise(), "WEBP")[:-100], "save it again"),
    "header alone": (b"\x89PNG\r\n\x1a\n", "save it again"),
    "PNG without a palette": (raw_png(1, 1, b"\x08\3\0\0\0", zlib.compress(b"\0\0")), "no palette"),
    "wide GIF screen": (wide_gif(), "65535 x 65535 pixels, more than.*shrink"),
    "GIF with a full screen": (filled_gif(), "13000 x 12500 pixels, more than.*shrink"),
    "GIF that grows": (growing_gif(), "beyond its screen"),
    "many frames in GIF": (animation("GIF", 50, "P"), "more than 16 frames"),
    "many frames in WebP": (animation("WEBP", 17, lossless=True), "more than 16 frames"),
    "many frames in APNG": (animation("PNG", 17), "more than 16 frames"),
    "many scans": (many_scans(), "more than 100 scans"),
    "run-length BMP": (rle_bmp(), "run-length"),
    "thin": (encode(Image.new("L", (201, 1)), "PNG"), "too thin.*200 to 1"),
    "colour key that Pillow misreads": (
        raw_png(1, 1, RGB16, zlib.compress(bytes(7)), chunk(b"tRNS", bytes(6))),
        "16-bit colours",
    ),
    "two colour keys": (
        raw_png(1, 1, GREY, zlib.compress(bytes(2)), chunk(b"tRNS", bytes(2)) + chunk(b"tRNS", b"\0\1")),
        "more than one transparent colour",
    ),
    "values beyond 16 bits": (Image.new("I", (1, 1), 70_000), "convert it to 8 bits"),
    "negative values": (Image.new("I", (1, 1), -1), "convert it to 8 bits"),
    "not a number": (Image.new("F", (1, 1), float("nan")), "convert it to 8 bits"),
    "floats beyond 8 bits": (Image.new("F", (1, 1), 256.0), "convert it to 8 bits"),
    "no area": (Image.new("RGB", (0, 5)), "too thin"),
    "TIFF opened by the caller": (Image.open(BytesIO(encode(noise(), "TIFF"))), "TIFF images are not accepted"),
    "http": ("http://127.0.0.1/x.png", "remote images are not fetched: pass the bytes or a data: URL"),
    "HTTPS": ("HTTPS://example.com/x.png", "remote images"),
    "space before": (" https://example.com/x.png", "remote images"),
    "file": ("file:///etc/passwd", "remote images"),
    "ftp": ("ftp://example.com/x.png", "remote images"),
    "no path": ("", "'.' is not a regular file"),
    "directory": ("/", "'/' is not a regular file"),
    "device": ("/dev/zero", "not a regular file"),
    "missing": ("/no/such\nfile.png", r"'such\\nfile\.png' cannot be read \(No such file"),
    "long path": ("x" * 100_000, "not a path: write data:image"),
    "NUL in path": ("a\0b", "not a path: give the path"),
    "no comma": ("data:image/png;base64", "no comma"),
    "bad base64": ("data:image/png;base64,!!!!", "not valid base64"),
    "escapes in base64": ("data:;base64,QUJDR%41%3D", "not valid base64: .*no %"),
    "no padding": ("data:image/png;base64,QUJDR", "not valid base64"),
    "base64 after its end": ("data:;base64,QQ==QQ==", "not valid base64"),
    "lone surrogate": ("data:,\ud800", "save it again"),
    "empty data": ("data:,", "is empty"),
    "text as data": ("data:image/png,hello", "convert it to one of these"),
    "escapes": ("data:," + "%00" * 1_000_001, "encode the image as base64"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_image_is_refused_in_one_line(name: str) -> None:
    source, message = HOSTILE[name]
    with pytest.raises(ImageError, match=message) as refusal:
        checked_images(source)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("source", [None, 5, bytearray(b"x"), ["a.png"], np.zeros((2, 2))])
def test_what_is_no_image_is_refused(source: Any) -> None:
    with pytest.raises(ImageError, match="pass a path, bytes, a data: URL or a PIL image"):
        checked_images(source)


def test_text_under_an_images_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_text("no image")
    with pytest.raises(ImageError, match="convert it to one of these"):
        checked_images(path)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encode(noise(), "PNG"))

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # modes do not bind root, who runs many a CI
    with pytest.raises(ImageError, match=r"'image\.png' cannot be read \(Permission denied\): check the path"):
        checked_images(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="not a regular file"):
        checked_images(tmp_path / "pipe")


def test_bytes_are_counted_for_every_source(tmp_path: Path) -> None:
    data = encode(noise(), "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    sources: list[ImageSource] = [data, path, url, "data:," + "x" * len(data)]
    for source in sources:
        with pytest.raises(ImageError, match="bytes: shrink or compress it"):
            checked_images(source, ImageLimits(max_bytes=len(data) - 1))
    for source in sources[:3]:
        assert len(checked_images(source, ImageLimits(max_bytes=len(data)))) == 1


def test_an_oversized_data_url_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("base64.b64decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="shrink or compress it"):
        checked_images("data:;base64," + "A" * 2000, ImageLimits(max_bytes=1000))


@pytest.mark.slow
def test_an_oversized_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="the image has 19000 x 19000 pixels, more than 40,000,000: shrink it"):
        checked_images(bomb_png())


def test_the_pixel_limit_is_exact() -> None:
    image = Image.new("RGB", (10, 10))
    assert len(checked_images(image, ImageLimits(max_pixels=100))) == 1
    with pytest.raises(ImageError, match="more than"):
        checked_images(image, ImageLimits(max_pixels=99))


def test_the_pixels_of_all_frames_are_added_up() -> None:
    data = animation("GIF", 4, "P", side=10)
    assert len(checked_images(data, ImageLimits(max_total_pixels=400))) == 4
    with pytest.raises(ImageError, match="399 pixels in total"):
        checked_images(data, ImageLimits(max_total_pixels=399))


def conversations(*images: ImageSource) -> list[Exchange]:
    """The images in one turn, and one by one in the history and the last turn."""
    *earlier, last = images
    return [Exchange("x", images), Exchange("x", (last,), history=tuple(Turn("x", (each,), "y") for each in earlier))]


def test_the_pixels_of_a_conversation_are_added_up_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    still, moving, opened = encode(noise(), "PNG"), animation("WEBP", 3, lossless=True, side=10), Image.new("L", (7, 1))
    total = noise().width * noise().height + 3 * 100 + 7
    for exchange in conversations(still, moving, opened):
        assert len(checked_exchange(exchange, ImageLimits(max_exchange_pixels=total))[1]) == 5
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    for exchange in conversations(still, moving, opened):
        with pytest.raises(
            ImageError, match=f"conversation's images have more than {total - 1:,} pixels in total: send"
        ):
            checked_exchange(exchange, ImageLimits(max_exchange_pixels=total - 1))


def test_a_file_is_read_once_for_its_pixels_and_for_its_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(noise(), "PNG"))
    opened: list[Path] = []
    open_file = Path.open

    def noted(self: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(self)
        return open_file(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", noted)
    for exchange in conversations(path, str(path)):
        opened.clear()
        assert len(checked_exchange(exchange)[1]) == 2
        assert opened == [path, path]


def test_too_many_files_are_refused_before_one_is_read() -> None:
    for exchange in conversations(*["/no/such.png"] * 49):
        with pytest.raises(ImageError, match="more than 48 images in total"):
            checked_exchange(exchange)


def test_an_animated_gif_counts_as_the_most_frames() -> None:
    moving, still = animation("GIF", 2, "P", side=10), animation("GIF", 1, "P", side=10)
    assert pixels_to_decode(moving) == 16 * 100
    assert pixels_to_decode(moving, ImageLimits(max_total_pixels=300)) == 300
    assert pixels_to_decode(still) == 100
    assert pixels_to_decode(checked_images(still)[0]) == 100


def test_sixteen_photographs_are_let_in_and_a_flood_is_not() -> None:
    photograph, large = CheckedImage(b"", 4032, 3024), CheckedImage(b"", 5770, 5770)
    assert len(checked_exchange(Exchange("x", (photograph,) * 16))[1]) == 16
    with pytest.raises(ImageError, match="more than 200,000,000 pixels in total"):
        checked_exchange(Exchange("x", (large,) * 24))


def test_pillows_warnings_stay_inside_and_its_settings_stay_as_they_were() -> None:
    invalid_apng = raw_png(1, 1, GREY, zlib.compress(b"\0\0"), chunk(b"acTL", bytes(8)))
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(checked_images(invalid_apng)) == 1
    assert not caught
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def valid_files() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    return [
        encode(noise(), "PNG", exif=exif),
        encode(noise("LA"), "PNG"),
        encode(noise("I").convert("I;16"), "PNG"),
        encode(noise("P"), "PNG", transparency=3),
        encode(noise(), "JPEG", exif=exif),
        encode(noise("CMYK"), "JPEG", progressive=True),
        encode(noise("RGBA"), "WEBP", lossless=True, exif=exif),
        encode(noise("P"), "BMP"),
        animation("PNG", 3, "RGBA"),
        animation("WEBP", 3, lossless=True),
        animation("GIF", 3, "P", disposal=2, comment=b"a comment"),
        animation("GIF", 3, "P", disposal=3),
    ]


def judged_or_refused(data: bytes) -> None:
    try:
        images = checked_images(data)
    except ImageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right, the text is checked when refused
    else:
        assert images


@given(
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF0000WEBPVP8X", b"BM"]), st.binary()
)
def test_arbitrary_bytes_are_judged_or_refused(signature: bytes, rest: bytes) -> None:
    judged_or_refused(signature + rest)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(valid_files()),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 3), st.binary(max_size=4)), max_size=8),
)
def test_mutated_files_are_judged_or_refused(data: bytes, edits: list[tuple[float, int, bytes]]) -> None:
    for share, removed, added in edits:
        at = int(share * len(data))
        data = data[:at] + added + data[at + removed :]
    judged_or_refused(data)


@given(st.text())
def test_arbitrary_text_is_judged_or_refused(text: str) -> None:
    with pytest.raises(ImageError):
        checked_images("data:" + text)


MEASURE = """
import sys
from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import checked_images

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))

data = sys.stdin.buffer.read()
before = peak()
try:
    checked_images(data)
except ImageError as error:
    print("refused", end=" ")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(bomb_png, id="pixels"),
        pytest.param(lambda: bomb_chunk(b"iCCP", b"x\0\0"), id="iCCP"),
        pytest.param(lambda: bomb_chunk(b"zTXt", b"x\0\0"), id="zTXt"),
        pytest.param(lambda: bomb_chunk(b"iTXt", b"x\0\1\0\0\0"), id="iTXt"),
        pytest.param(growing_gif, id="growing GIF"),
        pytest.param(wide_gif, id="wide GIF"),
        pytest.param(filled_gif, id="filled GIF"),
        pytest.param(lambda: encode(Image.new("RGB", (16_000, 4000)), "WEBP", lossless=True, method=0), id="WebP"),
    ],
)
def test_a_bomb_costs_little_memory(make: Any) -> None:
    data = make()
    assert len(data) < 2 * MEGABYTE
    done = subprocess.run([sys.executable, "-c", MEASURE], input=data, capture_output=True, check=True)
    outcome, megabytes = done.stdout.decode().split()
    assert outcome == "refused"
    assert int(megabytes) < 100
