"""Drawn images: deterministic, both labels in every layout, words inside the image."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, ImageDraw

from guardreasoner_vl.sources.synthetic import images as drawn
from guardreasoner_vl.sources.synthetic import phrases
from guardreasoner_vl.sources.synthetic.images import Style, draw_folder, draw_sample

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.types import GoldLabel

pytestmark = pytest.mark.slow
LABELS: tuple[GoldLabel, GoldLabel] = ("harmful", "unharmful")


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [draw_folder(tmp_path / name, 12, seed).parent for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    first, again, other = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in folders
    )
    assert len(first) == 13
    assert first == again
    assert first != other
    with Image.open(folders[0] / "images/000000.png") as image:
        assert image.size in drawn.SIZES
        assert image.mode == "RGB"
    rows = [json.loads(line) for line in (folders[0] / "train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"drawn-5-{number:06d}" for number in range(12)]


@pytest.fixture(scope="module")
def many() -> list[tuple[Style, dict[str, Any]]]:
    """Style and row of many samples, without the drawing."""
    styles: list[Style] = []
    blank = Image.new("RGB", (28, 28))

    def style(rng: random.Random) -> Style:
        styles.append(original(rng))
        return styles[-1]

    original = drawn.draw_style
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "draw_style", style)
        patch.setattr(drawn, "draw_scene", lambda rng, style: blank)
        for layout in drawn.LAYOUTS:
            patch.setitem(drawn.LAYOUTS, layout, lambda rng, style, text: blank)
        rng = random.Random(0)
        rows = [draw_sample(rng, str(number))[1] for number in range(3000)]
    return list(zip(styles, rows, strict=True))


def test_every_look_has_both_labels(many: list[tuple[Style, dict[str, Any]]]) -> None:
    shown = [(style, row) for style, row in many if row["meta"]["image_text"] and not row["prompt"]]
    for look in ("layout", "size", "ink", "paper", "font", "points", "upper"):
        for value in {getattr(style, look) for style, _ in shown}:
            labels = [row["request_label"] for style, row in shown if getattr(style, look) == value]
            assert 0.3 < labels.count("harmful") / len(labels) < 0.7, (look, value)
    assert {style.layout for style, _ in shown} == set(drawn.LAYOUTS)
    assert len({style.font for style, _ in shown}) > 1


def is_harmful(text: str) -> bool:
    """Whether made-up words are of the harmful kind, by looking them up."""
    verbs = {f"{verb} {thing}" for verb, things in phrases.HARMFUL.items() for thing in things}
    remarks = {remark.format(group) for remark in phrases.HARMFUL_REMARKS for group in phrases.GROUPS}
    return text in remarks or any(frame.format(action) == text for frame in phrases.FRAMES for action in verbs)


def test_a_pair_is_harmful_if_either_part_is(many: list[tuple[Style, dict[str, Any]]]) -> None:
    seen = set()
    for _, row in many:
        shown, asked = is_harmful(row["meta"]["image_text"]), is_harmful(row["prompt"])
        assert row["request_label"] == ("harmful" if shown or asked else "unharmful"), row
        assert row["modality"] == ("text-image" if row["prompt"] else "image")
        seen.add((shown, asked, bool(row["prompt"]), bool(row["meta"]["image_text"])))
    assert len(seen) == 9  # harmful, benign or no words beside a harmful, a benign or no prompt


def test_no_phrase_is_both(many: list[tuple[Style, dict[str, Any]]]) -> None:
    rng = random.Random(1)
    texts = {label: {phrases.phrase(rng, label) for _ in range(3000)} for label in LABELS}
    assert not texts["harmful"] & texts["unharmful"]
    assert all(is_harmful(text) for text in texts["harmful"])
    assert not any(is_harmful(text) for text in texts["unharmful"] | set(phrases.NEUTRAL_PROMPTS))


def longest_phrases() -> list[str]:
    actions = {
        f"{verb} {thing}" for things in (phrases.HARMFUL, phrases.BENIGN) for verb in things for thing in things[verb]
    }
    remarks = {
        remark.format(group)
        for remark in (*phrases.HARMFUL_REMARKS, *phrases.BENIGN_REMARKS)
        for group in phrases.GROUPS
    }
    texts = {frame.format(action) for frame in phrases.FRAMES for action in actions} | remarks
    by_word = sorted(texts, key=lambda text: max(len(word) for word in text.split()))
    return [*sorted(texts, key=len)[-3:], *by_word[-2:]]


@pytest.mark.parametrize("layout", sorted(drawn.LAYOUTS))
def test_words_fit_into_the_image(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[tuple[tuple[float, ...], tuple[int, int]]] = []
    written: list[str] = []
    original = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: Any, text: str, *args: Any, **options: Any) -> None:
        font = options.get("font") or args[1]
        boxes.append((self.textbbox(xy, text, font), self.im.size))
        written.append(text)
        original(self, xy, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    rng = random.Random(0)
    style = drawn.draw_style(rng)
    for phrase in longest_phrases():
        for size in drawn.SIZES:
            for font in (None, *drawn.fonts()):
                boxes.clear()
                written.clear()
                style = replace(style, size=size, font=font, points=32, upper=True, layout=layout)
                drawn.draw_text(rng, style, phrase.upper())
                words = " ".join(line for line in written if not line.rstrip(".").isdigit())
                assert words.split() == phrase.upper().split()
                for (x0, y0, x1, y1), (width, height) in boxes:
                    assert x0 >= 0, (phrase, style)
                    assert y0 >= 0, (phrase, style)
                    assert x1 <= width, (phrase, style)
                    assert y1 <= height, (phrase, style)


def test_an_image_without_words_is_unharmful(many: list[tuple[Style, dict[str, Any]]]) -> None:
    wordless = [row for _, row in many if not row["meta"]["image_text"]]
    assert 0.08 < len(wordless) / len(many) < 0.16
    assert {row["request_label"] for row in wordless if not row["prompt"]} == {"unharmful"}


def test_every_word_is_found_where_it_was_drawn() -> None:
    rng = random.Random(3)
    for _ in range(40):
        text = phrases.phrase(rng, "unharmful")
        image = drawn.draw_words(rng, text)
        words = image.info[drawn.WORDS]
        assert " ".join(word.text for word in words) == text
        for word in words:
            assert len(word.edges) == len(word.text) + 1
            assert list(word.edges) == sorted(word.edges)
            box = (round(word.edges[0]), int(word.top), round(word.edges[-1]), int(word.bottom))
            inside = image.crop(box)
            assert len(inside.getcolors(inside.width * inside.height) or ()) > 1, (text, word)
        assert all(a.edges[-1] <= b.edges[0] or a.bottom <= b.top for a, b in itertools.pairwise(words)), words


def test_letters_stand_between_their_edges() -> None:
    image = drawn.draw_words(random.Random(1), "w i", plain=True)
    wide, narrow = image.info[drawn.WORDS]
    assert wide.edges[1] - wide.edges[0] > 2 * (narrow.edges[1] - narrow.edges[0])
