"""Synthetic images: words in many layouts, harmful and benign ones in the same layouts.

A layout must not reveal the label, so every layout, font and colour is drawn with both kinds of words, and images
without words are drawn too. All words are made up and mild. The positions of the words are stored in
`image.info[WORDS]`, one `Word` each, for `training.reading`.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from guardreasoner_vl.sources.synthetic import phrases
from guardreasoner_vl.storage.atomic import write_whole, writing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from guardreasoner_vl.types import GoldLabel

SIZES = ((224, 224), (252, 196), (196, 252), (280, 168))
CARD_SIZES = ((168, 56), (196, 56), (168, 84), (224, 84))
CARDS = 0.75
WORDS = "words"
GRID = 14
"""Pixels: lines start at multiples of a patch's side, so that a small vision tower sees few vertical offsets."""

WITHOUT_WORDS = 0.12
WITH_PROMPT = 0.4
LIGHT = ("#ffffff", "#f4ecd8", "#ffe9a8", "#d9f2e6", "#dbe7ff", "#f7d7e1")
DARK = ("#000000", "#1d2733", "#5a1010", "#123d1f", "#10205a", "#3a2b16")


@dataclass(frozen=True)
class Style:
    """The look of an image, drawn independently of the label; `size` in pixels, `points` the font size."""

    size: tuple[int, int]
    ink: str
    paper: str
    font: str | None
    points: int
    upper: bool
    layout: str


@dataclass(frozen=True)
class Word:
    """A word of the text in its original case, and its position in pixels.

    `edges` has the left edge of each letter, then the right edge of the last one.
    """

    text: str
    edges: tuple[float, ...]
    top: float
    bottom: float


def draw_folder(folder: Path, count: int, seed: int) -> Path:
    """Write `count` rows and their images in the layout of `sources.jsonl`; the same seed gives the same bytes."""
    rng = random.Random(seed)
    return write_rows(folder, (draw_sample(rng, f"drawn-{seed}-{number:06d}") for number in range(count)))


def write_rows(folder: Path, samples: Iterable[tuple[Image.Image | None, dict[str, Any]]]) -> Path:
    """Write (image, row) pairs in the layout of `sources.jsonl` and return the rows' file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (image, row) in enumerate(samples):
        name = f"images/{number:06d}.png"
        if image is not None:
            with writing(folder / name):
                image.save(folder / name, compress_level=1)
        rows.append({**row, "images": [name] if image is not None else []})
    path = folder / "train.jsonl"
    # Written last and atomically, so that a folder with rows is complete.
    write_whole(path, (json.dumps(row).encode("utf-8") + b"\n" for row in rows))
    return path


def draw_sample(rng: random.Random, sample_id: str) -> tuple[Image.Image, dict[str, Any]]:
    """One image and its row."""
    style = draw_style(rng)
    label: GoldLabel = rng.choice(("harmful", "unharmful"))
    prompt = ""
    if rng.random() < WITHOUT_WORDS:
        text, image = "", draw_scene(rng, style)
        label = "unharmful"
    else:
        text = phrases.phrase(rng, label)
        image = draw_text(rng, style, text)
    if rng.random() < WITH_PROMPT:
        prompt, label = _prompt(rng, label)
    return image, _row(sample_id, prompt, text, label)


def draw_text(rng: random.Random, style: Style, text: str) -> Image.Image:
    """An image of `text` in the style's layout."""
    return LAYOUTS[style.layout](rng, style, text)


def draw_words(rng: random.Random, text: str, plain: bool = False) -> Image.Image:
    """An image of `text` in a random style, mostly on a card; `plain` is a black-on-white card in one font and size."""
    style = draw_style(rng)
    if plain:
        face = next(iter(fonts()), None)
        style = replace(style, ink=DARK[0], paper=LIGHT[0], font=face, points=24, upper=False)
    return _card(rng, style, text) if plain or rng.random() < CARDS else draw_text(rng, style, text)


def _card(rng: random.Random, style: Style, text: str) -> Image.Image:
    """A small image filled by its words."""
    width, height = rng.choice(CARD_SIZES)
    image = Image.new("RGB", (width, height), style.paper)
    _write(image, style, text, (2, 0, width - 2, height), style.ink, False)
    return image


def _row(sample_id: str, prompt: str, text: str, label: GoldLabel) -> dict[str, Any]:
    return {
        "id": sample_id,
        "source": "drawn",
        "modality": "text-image" if prompt else "image",
        "prompt": prompt,
        "request_label": label,
        "meta": {"image_text": text},
    }


def _prompt(rng: random.Random, label: GoldLabel) -> tuple[str, GoldLabel]:
    """A prompt for the image, and the label of the pair: harmful if either part is."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(phrases.NEUTRAL_PROMPTS), label
    asked: GoldLabel = "harmful" if kind < 0.8 else "unharmful"
    return phrases.phrase(rng, asked), "harmful" if "harmful" in (label, asked) else "unharmful"


def draw_style(rng: random.Random) -> Style:
    """A random look."""
    ink, paper = rng.choice(DARK), rng.choice(LIGHT)
    if rng.random() < 0.4:
        ink, paper = paper, ink
    return Style(
        rng.choice(SIZES),
        ink,
        paper,
        rng.choice((None, *fonts())),
        rng.choice((20, 24)),
        rng.random() < 0.35,
        rng.choice(sorted(LAYOUTS)),
    )


def fonts() -> tuple[str, ...]:
    """Paths of the DejaVu fonts in matplotlib (extra `train`), so that drawing needs no system fonts."""
    try:
        from matplotlib import get_data_path
    except ImportError:
        return ()
    faces = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
    return tuple(str(Path(get_data_path()) / "fonts/ttf" / f"{face}.ttf") for face in faces)


def _font(style: Style, points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(style.font, points) if style.font else ImageFont.load_default(points)


def _wrapped(draw: ImageDraw.ImageDraw, style: Style, text: str, width: int, height: int) -> tuple[list[str], Any, int]:
    """Wrap `text` at the largest font size, up to the style's, that fits: lines, font, line height in pixels."""
    for points in range(style.points, 9, -2):
        font = _font(style, points)
        lines: list[str] = []
        for word in text.split():
            longer = f"{lines[-1]} {word}" if lines else word
            if lines and draw.textlength(longer, font) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
        step = -(-int(points * 1.2) // GRID) * GRID
        if step * len(lines) <= height and all(draw.textlength(line, font) <= width for line in lines):
            break
    return lines, font, step


def _write(image: Image.Image, style: Style, text: str, box: tuple[int, int, int, int], ink: str, centre: bool) -> None:
    draw = ImageDraw.Draw(image)
    x0, y0, x1, y1 = box
    lines, font, step = _wrapped(draw, style, text.upper() if style.upper else text, x1 - x0, y1 - y0)
    y = _snapped(y0 + max(0, (y1 - y0 - step * len(lines)) // 2))
    positions = image.info.setdefault(WORDS, [])
    words = iter(text.split())
    for line in lines:
        x = _snapped(x0 + ((x1 - x0 - draw.textlength(line, font)) / 2 if centre else 0))
        draw.text((x, y), line, fill=ink, font=font)
        for match in re.finditer(r"\S+", line):
            edges = tuple(x + draw.textlength(line[:at], font) for at in range(match.start(), match.end() + 1))
            positions.append(Word(next(words), edges, y, y + step))
        y += step


def _snapped(position: float) -> int:
    return round(position / GRID) * GRID


def _page(rng: random.Random, style: Style, text: str) -> Image.Image:
    image = Image.new("RGB", style.size, style.paper)
    margin = max(8, rng.randint(6, 24))  # a smaller margin would snap to the edge
    _write(image, style, text, (margin, margin, style.size[0] - margin, style.size[1] - margin), style.ink, False)
    return image


def _poster(rng: random.Random, style: Style, text: str) -> Image.Image:
    image = Image.new("RGB", style.size, style.paper)
    width, height = style.size
    ImageDraw.Draw(image).rectangle((5, 5, width - 6, height - 6), outline=style.ink, width=rng.randint(2, 5))
    _write(image, style, text, (16, 16, width - 16, height - 16), style.ink, True)
    return image


def _meme(rng: random.Random, style: Style, text: str) -> Image.Image:
    image = draw_scene(rng, style)
    width, height = style.size
    words = text.split()
    half = (len(words) + 1) // 2
    for part, top in ((words[:half], 4), (words[half:], int(height * 0.66))):
        band = (0, top, width, top + int(height * 0.3))
        ImageDraw.Draw(image).rectangle(band, fill=style.paper)
        _write(image, style, " ".join(part), (8, top, width - 8, band[3]), style.ink, True)
    return image


def _list(rng: random.Random, style: Style, text: str) -> Image.Image:
    image = Image.new("RGB", style.size, style.paper)
    width, height = style.size
    top = int(height * 0.6)
    _write(image, style, text, (10, 8, width - 10, top), style.ink, False)
    font = _font(style, min(style.points, 20))
    for number in range(rng.randint(2, 3)):
        ImageDraw.Draw(image).text((12, top + number * (height - top) // 3), f"{number + 1}.", style.ink, font)
    return image


def _bubble(rng: random.Random, style: Style, text: str) -> Image.Image:
    image = Image.new("RGB", style.size, "#9fb4c7")
    width, height = style.size
    bottom = int(height * rng.uniform(0.6, 0.9))
    ImageDraw.Draw(image).rounded_rectangle((10, 10, width - 10, bottom), radius=16, fill=style.paper)
    _write(image, style, text, (22, 18, width - 22, bottom - 8), style.ink, False)
    return image


def draw_scene(rng: random.Random, style: Style) -> Image.Image:
    """An image without words: shapes, a gradient or noise."""
    kind = rng.randrange(3)
    if kind == 0:
        image = Image.linear_gradient("L").resize(style.size).convert("RGB")
        return Image.blend(image, Image.new("RGB", style.size, style.paper), rng.uniform(0.2, 0.8))
    if kind == 1:
        noise = Image.frombytes("RGB", (28, 28), rng.randbytes(28 * 28 * 3))
        return noise.resize(style.size, Image.Resampling.BICUBIC)
    image = Image.new("RGB", style.size, style.paper)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 6)):
        x, y, side = rng.randrange(style.size[0]), rng.randrange(style.size[1]), rng.randint(20, 120)
        shape = rng.choice((draw.ellipse, draw.rectangle))
        shape((x, y, x + side, y + side), fill=rng.choice(LIGHT + DARK))
    return image


LAYOUTS: dict[str, Callable[[random.Random, Style, str], Image.Image]] = {
    "bubble": _bubble,
    "list": _list,
    "meme": _meme,
    "page": _page,
    "poster": _poster,
}
