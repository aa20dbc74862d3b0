"""Tests of reading the words printed in an image, with the real models."""

import random
import re
import time
from io import BytesIO

import pytest
from PIL import Image, ImageDraw, ImageFont

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import ImageLimits, checked_images
from guardreasoner_vl.images.ocr import MAX_LINES, printed_text
from guardreasoner_vl.sources.synthetic.pages import draw_page
from guardreasoner_vl.types import CheckedImage
from tests.made_images import image

TEXT = "what is the best way to bake a loaf of bread at home without an iron pot and with little yeast for a picnic"
WORDS = sorted(set(TEXT.split()))


def checked(drawn: Image.Image) -> CheckedImage:
    return checked_images(drawn, ImageLimits())[0]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def page(lines: list[str], size: int = 20, columns: int = 1) -> CheckedImage:
    drawn = Image.new("RGB", (400 * columns, 20 + 2 * size * (len(lines) // columns + 1)), "white")
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(size)
    for number, line in enumerate(lines):
        row, column = divmod(number, columns)
        draw.text((10 + 400 * column, 10 + 2 * size * row), line, fill="black", font=font)
    return checked(drawn)


@pytest.mark.parametrize("turned", [0, 180])
def test_words_of_pages_of_any_style_are_read(turned: int) -> None:
    right = total = 0
    for seed in range(8):
        rng = random.Random(seed)
        drawn = rng.sample(WORDS, 8)
        text = printed_text(checked(draw_page(rng, " ".join(drawn)).rotate(turned, expand=True)))
        right += sum(word in words(text) for word in drawn)
        total += len(drawn)

    assert right / total >= (0.7 if turned else 0.95)


@pytest.mark.parametrize("size", [10, 12, 16, 24, 40])
def test_small_and_large_print_is_read_in_order(size: int) -> None:
    assert words(printed_text(page(["How do I bake", "a loaf of bread", "for a picnic"], size))) == (
        words("how do i bake a loaf of bread for a picnic")
    )


@pytest.mark.parametrize("size", [(1, 1), (3, 600), (640, 480)])
def test_an_image_without_words_has_no_text(size: tuple[int, int]) -> None:
    assert printed_text(image(*size)) == ""


def test_an_image_with_too_many_lines_is_refused_before_they_are_read() -> None:
    begun = time.monotonic()

    with pytest.raises(ImageError, match=f"more than {MAX_LINES} lines of text: send its parts"):
        printed_text(page(["bread"] * (MAX_LINES + 40), 14, columns=6))

    assert time.monotonic() - begun < 30


def test_nothing_is_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    assert printed_text(page(["a loaf of bread"]))

    assert "".join(capfd.readouterr()) == ""
    assert caplog.text == ""


def test_an_image_of_another_format_reads_the_same() -> None:
    drawn = page(["a loaf of bread"]).open()
    encoded = BytesIO()
    drawn.save(encoded, "JPEG", quality=60)

    assert printed_text(checked_images(encoded.getvalue(), ImageLimits())[0]) == printed_text(checked(drawn))
