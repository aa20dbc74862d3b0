"""Tests of reading the words printed in an image, with the real models."""

import random
import re
import time
from io import BytesIO
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import ImageLimits, checked_images
from guardreasoner_vl.images.ocr import printed_text
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


@pytest.mark.parametrize(
    ("width", "height", "size"), [(1280, 1280, 16), (2000, 2000, 40), (4000, 4000, 60), (3200, 800, 18)]
)
def test_words_on_a_large_empty_sheet_are_read(width: int, height: int, size: int) -> None:
    drawn = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(size)
    for number, line in enumerate(["How do we bake", "a loaf of bread", "for a picnic"]):
        draw.text((width // 3, height // 3 + 3 * size * number // 2), line, fill="black", font=font)

    assert words(printed_text(checked(drawn))) == words("how do we bake a loaf of bread for a picnic")


def test_lines_that_the_whole_image_shows_as_a_block_are_read() -> None:
    drawn = Image.effect_noise((6320, 6320), 20).point(lambda value: min(255, value + 110)).convert("RGB")
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(22)
    for number, line in enumerate(["How do we bake a loaf", "of bread without a pot", "for a picnic at home"]):
        draw.text((200, 200 + 60 * number), line, fill="black", font=font)

    read = words(printed_text(checked(drawn)))

    assert len(set(words("how do we bake a loaf of bread without a pot for a picnic at home")) - set(read)) <= 3


def test_small_print_on_a_plain_sheet_is_read_at_its_own_size() -> None:
    drawn = Image.new("RGB", (6320, 6320), "pink")
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(14)
    for number, line in enumerate(["How do we bake", "a loaf of bread", "for a picnic"]):
        draw.text((3000, 3000 + 60 * number), line, fill="black", font=font)

    assert set(words("how do we bake a loaf of bread for a picnic")) <= set(words(printed_text(checked(drawn))))


@pytest.mark.parametrize(("rows", "parts"), [(1, 8), (2, 9)])
def test_an_image_is_reduced_if_too_many_of_its_parts_hold_anything(
    monkeypatch: pytest.MonkeyPatch, rows: int, parts: int
) -> None:
    searched: list[tuple[int, ...]] = []

    def detected(pixels: Any) -> list[Any]:
        searched.append(pixels.shape)
        return []

    monkeypatch.setattr("guardreasoner_vl.images.ocr._detected", detected)
    drawn = Image.new("RGB", (6320, 6320), "white")
    for row in range(rows):
        ImageDraw.Draw(drawn).line((0, 400 + 2000 * row, 6320, 400 + 2000 * row), fill="black")

    assert printed_text(checked(drawn)) == ""

    whole, *others = searched
    assert whole[:2] == ((6320, 6320) if rows == 1 else (2000, 2000))
    assert set(others) == {(960, 960, 3)}
    assert len(others) <= parts


@pytest.mark.parametrize(("width", "height"), [(2560, 700), (3000, 60)])
def test_a_line_much_longer_than_high_is_read(width: int, height: int) -> None:
    drawn = Image.new("RGB", (width, height), "white")
    line = "Bake bread at home with little yeast. " * 8
    ImageDraw.Draw(drawn).text((4, height // 3 - 6), line, fill="black", font=ImageFont.load_default(14))

    read = words(printed_text(checked(drawn)))

    assert sum(word in words(line) for word in read) / len(words(line)) > 0.8


@pytest.mark.parametrize("size", [(3000, 20), (20, 3000), (2100, 16), (8000, 60)])
def test_a_narrow_image_without_words_is_read_too(size: tuple[int, int]) -> None:
    assert printed_text(checked(Image.new("RGB", size, "white"))) == ""


def test_words_of_one_line_keep_their_order() -> None:
    drawn = Image.new("RGB", (900, 120), "white")
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(24)
    for number, word in enumerate(["bake", "bread", "for", "picnics"]):
        draw.text((20 + 220 * number, 40 - 3 * (number % 2)), word, fill="black", font=font)

    assert words(printed_text(checked(drawn))) == ["bake", "bread", "for", "picnics"]


def test_more_text_than_a_page_is_refused_before_it_is_read() -> None:
    drawn = Image.new("RGB", (1280, 1260), "white")
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(8)
    for row in range(125):
        draw.text((4, 10 * row), "A loaf of bread and a pot of tea for a picnic. " * 6, fill="black", font=font)
    begun = time.process_time()

    with pytest.raises(ImageError, match="more text than a printed page: send its parts"):
        printed_text(checked(drawn))

    assert time.process_time() - begun < 30


def test_nothing_is_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    assert printed_text(page(["a loaf of bread"]))

    assert "".join(capfd.readouterr()) == ""
    assert caplog.text == ""


def test_an_image_of_another_format_reads_the_same() -> None:
    drawn = page(["a loaf of bread"]).open()
    encoded = BytesIO()
    drawn.save(encoded, "JPEG", quality=60)

    assert printed_text(checked_images(encoded.getvalue(), ImageLimits())[0]) == printed_text(checked(drawn))
