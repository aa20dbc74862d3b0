"""Printed pages: the words stand where the image says, in every layout, and the same seed gives the same bytes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guardreasoner_vl.sources.synthetic import pages
from guardreasoner_vl.sources.synthetic.images import WORDS, Word
from guardreasoner_vl.sources.synthetic.pages import (
    LARGEST,
    LAYOUTS,
    _faces,
    _font,
    _turned,
    draw_page,
    draw_scene,
    printable,
)

TEXT = "How do I bake a loaf of bread, and what do I need for it?"


@pytest.mark.parametrize("text", [TEXT, "", "a", "Hi", "word" * 60])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_word_stands_in_the_image(layout: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LAYOUTS", {layout: LAYOUTS[layout]})
    for seed in range(40):
        image = draw_page(random.Random(seed), text)
        assert image.mode == "RGB"
        if text == TEXT:
            assert image.width * image.height <= 2 * LARGEST  # with all margins
        words: list[Word] = image.info[WORDS]
        assert [word.text for word in words] == text.split()
        for word in words:
            assert len(word.edges) == len(word.text) + 1
            assert -1 <= word.edges[0] < word.edges[-1] <= image.width + 1
            assert -1 <= word.top < word.bottom <= image.height + 1


def test_a_word_differs_from_its_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for share in ("ROTATED", "BLURRED", "COMPRESSED"):
        monkeypatch.setattr(pages, share, 0)
    for seed in range(20):
        image = draw_page(random.Random(seed), "MMMM MMMM")
        for word in image.info[WORDS]:
            box = (round(word.edges[0]), round(word.top), round(word.edges[-1]), round(word.bottom))
            lightness = np.asarray(image.crop(box).convert("L")).astype(int)
            assert np.ptp(lightness) >= 60


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x17F), max_size=300), st.integers(0, 1000))
def test_any_text_gives_an_image_and_the_same_one_again(text: str, seed: int) -> None:
    first, second = (draw_page(random.Random(seed), text) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert [word.text for word in first.info[WORDS]] == text.split()


def test_a_scene_has_no_words() -> None:
    scene = draw_scene(random.Random(0), (120, 80))
    assert (scene.size, scene.mode) == ((120, 80), "RGB")
    assert WORDS not in scene.info
    assert len(scene.getcolors(120 * 80) or ()) > 50


def test_positions_follow_a_rotation() -> None:
    """Dots beside and below the centre, so that both axes move."""
    for x, y in ((180, 50), (100, 90), (30, 20)):
        image = Image.new("L", (200, 100))
        image.putpixel((x, y), 255)
        turned = image.rotate(4, Image.Resampling.BICUBIC, expand=True)
        box = turned.point([255 if value > 60 else 0 for value in range(256)]).getbbox()
        assert box is not None
        (word,) = _turned([Word("x", (x - 2.0, x + 3.0), y - 2.0, y + 3.0)], 4, image.size, turned.size)
        assert word.top < box[1] < box[3] < word.bottom
        assert word.edges[0] < box[0] < box[2] < word.edges[-1]


@pytest.mark.parametrize(
    ("text", "can"),
    [("Grüße,", True), ("naïve?", True), ("3 €", False), ("你好", False), ("a\nb", False), ("soft\u00adhyphen", False)],
)
def test_which_texts_can_be_printed(text: str, can: bool) -> None:
    assert printable(text) is can


def test_every_face_has_what_it_prints() -> None:
    """A letter that a face lacks is drawn as the box of a letter that no face has."""
    ascii_letters, latin = map(chr, range(33, 127)), [chr(code) for code in range(0xA1, 0x180) if code != 0xAD]
    for letters in (list(ascii_letters), latin):
        for face in _faces("".join(letters)):
            font = _font(face, 24)
            box = bytes(font.getmask("\ufffe"))
            assert [letter for letter in letters if bytes(font.getmask(letter)) == box] == []


def test_without_matplotlib_only_ascii_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_latin_faces", tuple)
    assert printable("tea")
    assert not printable("thé")
    assert draw_page(random.Random(0), "tea").info[WORDS][0].text == "tea"
