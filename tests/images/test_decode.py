"""Every mode and source gives the RGB that was worked out by hand."""

from __future__ import annotations

import base64
import struct
import zlib
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as qwen_smart_resize

from guardreasoner_vl.errors import ImageError, InputError
from guardreasoner_vl.images.decode import ImageLimits, checked_images, decoded_images, file_ending
from guardreasoner_vl.images.geometry import LAYOUTS, PixelBudget, merge_images, smart_resize
from guardreasoner_vl.types import CheckedImage

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.images.geometry import Layout
    from guardreasoner_vl.types import ImageSource

Pixel = tuple[int, ...]
RED, GREEN, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)


def encode(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(size: tuple[int, int], depth: int, colour: int, row: bytes, *extra: bytes) -> bytes:
    """A PNG of equal rows, with the chunks `extra` before the pixels; Pillow cannot write all of these."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * size[1]))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


def clear_grey(key: int) -> bytes:
    """The chunk that makes one grey transparent."""
    return chunk(b"tRNS", struct.pack(">H", key))


def dot(mode: str, value: float | Pixel) -> Image.Image:
    return Image.new(mode, (1, 1), value)


def rgb_of(image: CheckedImage, at: tuple[int, int] = (0, 0)) -> Pixel:
    pixel = image.open().getpixel(at)
    assert isinstance(pixel, tuple)
    return pixel


def variants(source: ImageSource) -> list[Pixel]:
    """The first pixel of each image."""
    return [rgb_of(image) for image in checked_images(source)]


STORED = "abcdef"
_GREYS = {letter: 40 * number for number, letter in enumerate(STORED)}


def letters() -> Image.Image:
    """Two rows of three pixels, of a grey for each letter."""
    greys = [_GREYS[letter] for letter in STORED]
    return Image.frombytes("L", (3, 2), bytes(greys)).convert("RGB")


def letters_of(image: CheckedImage) -> str:
    named = {grey: letter for letter, grey in _GREYS.items()}
    return "".join(named[grey] for grey in image.open().getchannel("R").tobytes())


def palette(*colours: Pixel, **info: object) -> Image.Image:
    image = dot("P", 0)
    image.putpalette([channel for colour in colours for channel in colour])
    image.info.update(info)
    return image


def sources_by_mode() -> dict[str, tuple[ImageSource, list[Pixel]]]:
    return {
        "1": (dot("1", 1), [WHITE]),
        "L": (dot("L", 100), [(100, 100, 100)]),
        "RGB": (dot("RGB", (1, 2, 3)), [(1, 2, 3)]),
        "RGBX": (dot("RGBX", (1, 2, 3, 0)), [(1, 2, 3)]),
        "P": (palette((9, 8, 7)), [(9, 8, 7)]),
        "CMYK": (dot("CMYK", (0, 255, 255, 0)), [RED]),
        "YCbCr": (dot("YCbCr", (255, 128, 128)), [WHITE]),
        "HSV": (dot("HSV", (0, 255, 255)), [RED]),
        # 51457 / 257 = 200.2; cut off at 255 it is white
        "I;16": (dot("I;16", 51457), [(200, 200, 200), WHITE]),
        "I;16B": (dot("I;16B", 51457), [(200, 200, 200), WHITE]),
        "I": (dot("I", 51457), [(200, 200, 200), WHITE]),
        # dark when scaled, visible when cut off
        "I low": (dot("I", 200), [(1, 1, 1), (200, 200, 200)]),
        "F to 1": (dot("F", 0.5), [(128, 128, 128)]),
        "F to 255": (dot("F", 200.4), [(200, 200, 200)]),
        # over white, over black, without alpha
        "RGBA opaque": (dot("RGBA", (1, 2, 3, 255)), [(1, 2, 3)]),
        "RGBA half": (dot("RGBA", (255, 0, 0, 128)), [(255, 127, 127), (128, 0, 0), RED]),
        "RGBA clear": (dot("RGBA", (0, 255, 0, 0)), [WHITE, BLACK, GREEN]),
        "RGBA barely clear": (dot("RGBA", (100, 100, 100, 250)), [(103, 103, 103)]),
        "LA": (dot("LA", (100, 0)), [WHITE, BLACK, (100, 100, 100)]),
        "La": (dot("La", (0, 0)), [WHITE, BLACK]),
        "RGBa": (dot("RGBa", (128, 0, 0, 128)), [(255, 127, 127), (128, 0, 0), RED]),
        "PA": (palette((255, 0, 0)).convert("PA"), [RED]),
        "P, clear index": (palette((255, 0, 0), transparency=0), [WHITE, BLACK, RED]),
        "P, alphas": (palette((255, 0, 0), transparency=b"\x80"), [(255, 127, 127), (128, 0, 0), RED]),
        "PNG of 16-bit grey": (
            raw_png((1, 1), 16, 0, struct.pack(">H", 51457)),
            [(200, 200, 200), WHITE],
        ),
        "PNG of 16-bit grey, clear": (
            raw_png((1, 1), 16, 0, struct.pack(">H", 51457), clear_grey(51457)),
            [WHITE, BLACK, (200, 200, 200)],
        ),
        "PNG of 1-bit grey, clear": (raw_png((1, 1), 1, 0, b"\0", clear_grey(0)), [WHITE, BLACK]),
        "PNG of 2-bit grey, clear": (raw_png((1, 1), 2, 0, b"\x80", clear_grey(2)), [WHITE, BLACK, (170, 170, 170)]),
        "PNG of 4-bit grey, clear": (raw_png((1, 1), 4, 0, b"\x80", clear_grey(8)), [WHITE, BLACK, (136, 136, 136)]),
        "PNG of 4-bit grey, clear by its lowest bits": (
            raw_png((1, 1), 4, 0, b"\x80", clear_grey(0x138)),
            [WHITE, BLACK, (136, 136, 136)],
        ),
        "PNG of 8-bit grey, clear": (raw_png((1, 1), 8, 0, b"\x88", clear_grey(136)), [WHITE, BLACK, (136, 136, 136)]),
        "PNG of 8-bit grey, clear by its lowest bits": (
            raw_png((1, 1), 8, 0, b"\x88", clear_grey(0x188)),
            [WHITE, BLACK, (136, 136, 136)],
        ),
        "PNG of 4-bit grey, another one clear": (raw_png((1, 1), 4, 0, b"\x80", clear_grey(7)), [(136, 136, 136)]),
        "PNG of 16-bit RGB": (raw_png((1, 1), 16, 2, struct.pack(">3H", 65535, 0, 25700)), [(255, 0, 100)]),
        "PNG of RGB, clear": (
            raw_png((1, 1), 8, 2, bytes(RED), chunk(b"tRNS", struct.pack(">3H", *RED))),
            [WHITE, BLACK, RED],
        ),
        "PNG of grey and alpha": (raw_png((1, 1), 8, 4, bytes([100, 0])), [WHITE, BLACK, (100, 100, 100)]),
        "PNG of 1-bit grey": (raw_png((1, 1), 1, 0, b"\x80"), [WHITE]),
        "BMP": (encode(dot("RGB", (1, 2, 3)), "BMP"), [(1, 2, 3)]),
        "WebP": (encode(dot("RGB", (1, 2, 3)), "WEBP", lossless=True), [(1, 2, 3)]),
        "GIF": (encode(dot("L", 77), "GIF"), [(77, 77, 77)]),
    }


@pytest.mark.parametrize("name", sources_by_mode())
def test_each_mode_becomes_the_rgb_variants_worked_out_by_hand(name: str) -> None:
    source, expected = sources_by_mode()[name]
    assert variants(source) == expected


def test_a_cmyk_jpeg_is_not_inverted() -> None:
    jpeg = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.allclose(variants(jpeg), [RED], atol=4)


def test_white_text_on_a_clear_ground_shows_in_a_variant() -> None:
    source = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    source.putpixel((1, 0), (255, 255, 255, 255))
    shown = [(rgb_of(image), rgb_of(image, (1, 0))) for image in checked_images(source)]
    assert (BLACK, WHITE) in shown


def test_an_image_that_only_shows_without_its_alpha_channel_is_judged() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 255, 0, 0))
    last = checked_images(image)[-1]
    assert (rgb_of(last), rgb_of(last, (1, 0))) == (RED, GREEN)


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, "abcdef"),
        (2, "cbafed"),
        (3, "fedcba"),
        (4, "defabc"),
        (5, "adbecf"),
        (6, "daebfc"),
        (7, "fcebda"),
        (8, "cfbead"),
    ],
)
@pytest.mark.parametrize("format_name", ["PNG", "WEBP"])
def test_exif_rotation_is_applied_and_a_mirrored_image_is_judged_as_stored_too(
    orientation: int, expected: str, format_name: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, *others = checked_images(encode(letters(), format_name, lossless=True, exif=exif))
    assert letters_of(image) == expected
    assert (image.width, image.height) == ((3, 2) if orientation < 5 else (2, 3))
    assert [letters_of(other) for other in others] == ([STORED] if orientation in (2, 4, 5, 7) else [])


def xmp_rotation(orientation: int) -> bytes:
    return f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()


@pytest.mark.parametrize("orientation", [2, 6])
def test_a_rotation_outside_of_the_exif_block_is_judged_with_and_without(orientation: int) -> None:
    images = checked_images(encode(letters(), "WEBP", lossless=True, xmp=xmp_rotation(orientation)))
    assert [letters_of(image) for image in images] == [{2: "cbafed", 6: "daebfc"}[orientation], STORED]


def test_a_rotation_that_exif_states_overrides_xmp() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (image,) = checked_images(encode(letters(), "WEBP", lossless=True, exif=exif, xmp=xmp_rotation(2)))
    assert letters_of(image) == "daebfc"


def test_a_mirrored_image_that_looks_the_same_is_judged_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 2
    assert variants(encode(Image.new("RGB", (3, 2), RED), "PNG", exif=exif)) == [RED]


def test_metadata_is_dropped_and_does_not_change_the_digest() -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret"
    rich = encode(dot("RGB", RED), "PNG", exif=exif, icc_profile=b"profile", dpi=(72, 72))
    (image,) = checked_images(rich)
    assert image.open().info == {}
    assert image.digest == checked_images(dot("RGB", RED))[0].digest


def test_the_digest_depends_on_pixels_and_shape_only() -> None:
    wide, tall = checked_images(Image.new("RGB", (2, 1)))[0], checked_images(Image.new("RGB", (1, 2)))[0]
    again = CheckedImage(encode(Image.new("RGB", (2, 1)), "PNG", compress_level=9), 2, 1)
    assert wide.digest != tall.digest
    assert wide.png != again.png
    assert wide.digest == again.digest
    assert len(wide.digest) == 64


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG"])
def test_every_frame_is_judged(format_name: str) -> None:
    colours = [RED, GREEN, (0, 0, 255)]
    first, *others = [Image.new("RGB", (4, 4), colour) for colour in colours]
    data = encode(first, format_name, save_all=True, append_images=others, lossless=True)
    assert variants(data) == colours
    assert variants(Image.open(BytesIO(data))) == colours


def test_a_pil_image_is_left_as_it_was() -> None:
    first, *others = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    image = Image.open(BytesIO(encode(first, "GIF", save_all=True, append_images=others)))
    image.seek(1)
    checked_images(image)
    assert image.tell() == 1
    kept = dot("RGB", RED)
    kept.info["dpi"] = (72, 72)
    checked_images(kept)
    assert kept.info == {"dpi": (72, 72)}


def test_an_mpo_photograph_is_its_main_image(tmp_path: Path) -> None:
    stereo = encode(Image.new("RGB", (16, 16), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    assert len(checked_images(stereo)) == 1
    assert len(checked_images(Image.open(BytesIO(stereo)))) == 1


def test_every_source_gives_the_same_image(tmp_path: Path) -> None:
    data = encode(dot("RGB", (1, 2, 3)), "PNG")
    path = tmp_path / "image.txt"
    path.write_bytes(data)
    encoded = base64.b64encode(data).decode()
    sources: list[ImageSource] = [
        data,
        path,
        str(path),
        dot("RGB", (1, 2, 3)),
        f"data:image/png;base64,{encoded}",
        f"DATA:text/html;charset=x;BASE64,{encoded}",
        f"data:;base64,{encoded[:9]}\r\n {encoded[9:]}",
        f"data:image/png,{quote(data)}",
    ]
    assert {checked_images(source)[0].digest for source in sources} == {checked_images(data)[0].digest}


@given(
    height=st.integers(1, 20_000),
    width=st.integers(1, 20_000),
    low=st.integers(28 * 28, 2_000_000),
    spread=st.integers(0, 12_000_000),
)
def test_smart_resize_is_qwens(height: int, width: int, low: int, spread: int) -> None:
    budget = PixelBudget(low, low + spread)
    try:
        expected = qwen_smart_resize(height, width, min_pixels=low, max_pixels=low + spread)
    except ValueError:
        with pytest.raises(ImageError, match="200 to 1"):
            smart_resize(height, width, budget)
    else:
        assert smart_resize(height, width, budget) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((56, 84), (56, 84)),
        ((1, 1), (56, 56)),
        ((100, 200), (112, 196)),  # 3.57 and 7.14 tiles
        ((28, 5600), (28, 5600)),
        ((2000, 1000), (1400, 700)),  # divided by the root of 2: 50.5 and 25.3 tiles
    ],
)
def test_smart_resize_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*size, PixelBudget(max_pixels=1_000_000)) == expected


@pytest.mark.parametrize("size", [(28, 5601), (0, 5), (5, 0)])
def test_smart_resize_refuses_thin_images(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="too thin"):
        smart_resize(*size, PixelBudget())


@pytest.mark.parametrize("budget", [(783, 1000), (2000, 1000), (-1, 1000)])
def test_an_impossible_budget_is_refused(budget: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="use 784 <= min_pixels <= max_pixels"):
        PixelBudget(*budget)


def test_the_limits_can_be_narrowed() -> None:
    png, jpeg = encode(dot("L", 1), "PNG"), encode(dot("L", 1), "JPEG")
    only_jpeg = ImageLimits(formats=frozenset({"JPEG"}))
    assert len(checked_images(jpeg, only_jpeg)) == 1
    with pytest.raises(ImageError, match="not a JPEG image"):
        checked_images(png, only_jpeg)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_images_are_what_the_images_show(kind: str) -> None:
    frames = [Image.new("RGBA", (30, 20), colour) for colour in ((250, 10, 10, 255), (10, 250, 10, 90), (0, 0, 250, 0))]
    buffer = BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=10)
    decoded = decoded_images(buffer.getvalue())
    checked = checked_images(buffer.getvalue())
    assert len(decoded) == len(checked) > 2
    for frame, image in zip(decoded, checked, strict=True):
        assert (frame.mode, frame.info) == ("RGB", {})
        assert frame.tobytes() == image.open().tobytes()
    assert decoded_images(checked[0])[0].tobytes() == checked[0].open().tobytes()
    with pytest.raises(ImageError):
        decoded_images(b"no image")


BLUE = (0, 0, 255)


def corners(image: Image.Image) -> list[Any]:
    right, low = image.width - 1, image.height - 1
    return [image.getpixel(at) for at in ((0, 0), (right, 0), (0, low), (right, low))]


def test_images_merge_side_by_side_at_the_larger_height() -> None:
    small, large = Image.new("RGB", (30, 20), RED), Image.new("RGB", (100, 50), BLUE)
    merged = merge_images(small, large, "side_by_side")
    assert (merged.mode, merged.size) == ("RGB", (175, 50))  # 30 * 50 / 20 = 75
    assert corners(merged) == [RED, BLUE, RED, BLUE]
    assert (merged.getpixel((74, 25)), merged.getpixel((75, 25))) == (RED, BLUE)
    assert corners(merge_images(large, small, "side_by_side")) == [BLUE, RED, BLUE, RED]
    assert (small.size, large.size) == ((30, 20), (100, 50))


def test_images_merge_stacked_at_the_larger_width() -> None:
    merged = merge_images(Image.new("RGB", (20, 30), RED), Image.new("RGB", (50, 100), BLUE), "stacked")
    assert merged.size == (50, 175)
    assert corners(merged) == [RED, RED, BLUE, BLUE]
    assert (merged.getpixel((25, 74)), merged.getpixel((25, 75))) == (RED, BLUE)


def test_what_needs_no_resizing_is_kept_to_the_bit() -> None:
    first, second = (Image.frombytes("RGB", (8, 6), bytes(range(at, at + 144))) for at in (0, 100))
    merged = merge_images(first, second, "side_by_side")
    assert merged.crop((0, 0, 8, 6)).tobytes() == first.tobytes()
    assert merged.crop((8, 0, 16, 6)).tobytes() == second.tobytes()


def test_a_merged_image_is_shrunk_to_the_most_pixels() -> None:
    square = Image.new("RGB", (100, 100), RED)
    assert merge_images(square, square, "side_by_side", max_pixels=5000).size == (100, 50)  # the root of 5000 / 2
    # Enlarged to a height of 3,000, the second would have 1.7 billion pixels.
    merged = merge_images(Image.new("RGB", (20, 3000), RED), Image.new("RGB", (950, 5), BLUE), "side_by_side")
    assert merged.height == 145  # the root of 4,000,000 / (1 / 150 + 190)
    assert merged.width == 1 + 27_550  # 0.97 of a pixel is one
    assert corners(merged) == [RED, BLUE, RED, BLUE]


@pytest.mark.slow
def test_a_merged_image_is_let_in_again_however_noisy() -> None:
    noise = Image.frombytes("RGB", (1500, 1500), np.random.default_rng(0).bytes(3 * 1500**2))
    merged = merge_images(noise, noise, "stacked")
    assert merged.size == (1414, 2828)
    assert checked_images(encode(merged, "PNG", compress_level=1))[0].height == 2828


@pytest.mark.parametrize("layout", ["side_by_side", "stacked"])
def test_thin_merged_images_are_refused_before_they_are_made(layout: Layout) -> None:
    wide, tall = Image.new("RGB", (20_000, 100)), Image.new("RGB", (100, 20_000))
    along, across = (wide, tall) if layout == "side_by_side" else (tall, wide)
    with pytest.raises(ImageError, match="too thin"):
        merge_images(along, along, layout)  # 400 to 1
    with pytest.raises(ImageError, match="too thin"):
        merge_images(along, Image.new("RGB", (1, 0)), layout)
    assert merge_images(across, across, layout).size == ((200, 20_000) if layout == "side_by_side" else (20_000, 200))


@given(
    sizes=st.tuples(*[st.tuples(st.integers(1, 60), st.integers(1, 60))] * 2),
    layout=st.sampled_from(LAYOUTS),
    most=st.integers(2000, 20_000),
)
def test_merging_keeps_aspect_ratios_and_the_limit(
    sizes: tuple[tuple[int, int], tuple[int, int]], layout: Layout, most: int
) -> None:
    merged = merge_images(Image.new("RGB", sizes[0], RED), Image.new("RGB", sizes[1], BLUE), layout, most)
    beside = layout == "side_by_side"
    line = [merged.getpixel((at, 0) if beside else (0, at)) for at in range(merged.width if beside else merged.height)]
    across = merged.height if beside else merged.width
    exact = [across * (one[0] / one[1] if beside else one[1] / one[0]) for one in sizes]
    assert set(line) == {RED, BLUE}
    for colour, length in zip((RED, BLUE), exact, strict=True):
        assert line.count(colour) >= 1
        assert abs(line.count(colour) - length) <= 1
    assert merged.width * merged.height <= most + 2 * across


@pytest.mark.parametrize(
    ("name", "ending"), [("PNG", ".png"), ("JPEG", ".jpeg"), ("WEBP", ".webp"), ("GIF", ".gif"), ("BMP", ".bmp")]
)
def test_a_file_gets_the_ending_of_its_bytes(name: str, ending: str) -> None:
    assert file_ending(encode(dot("RGB", RED), name)) == ending


@pytest.mark.parametrize("data", [b"", b"text", b"%PDF-1.7"])
def test_what_is_no_image_gets_no_ending(data: bytes) -> None:
    assert file_ending(data) == ""
