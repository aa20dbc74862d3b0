"""Images of printed text as people send them: pages, posters, chats, screenshots, memes and signs.

Text has 10 to 48 pixels before a model resizes the image, stands anywhere, in any common face, dark on light or light
on dark, on paper or over a scene; some images are rotated by up to 4 degrees, shrunk and enlarged again, or bear the
traces of JPEG. Nothing about an image depends on a label. The positions of the words are in `image.info[WORDS]`, as in
`sources.synthetic.images`. The same seed gives the same image with the same fonts and the same Pillow.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from guardreasoner_vl.sources.synthetic.images import WORDS, Word

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

Colour = tuple[int, int, int]

POINTS = (10, 48)
"""Font sizes in pixels, smallest and largest; small ones are drawn as often as large ones on a logarithmic scale."""

WIDTHS = (160, 640)
"""Width of the text in pixels, smallest and largest, before it is made to fit."""

LARGEST = 420_000
"""Largest area of the text and a margin, in pixels; text that needs more gets a smaller font."""

ROTATED, BLURRED, COMPRESSED = 0.2, 0.15, 0.35
"""Shares of the images that are rotated, shrunk and enlarged again, and stored as JPEG."""

_TURN = 4.0
_CONTRAST = 100
_FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
)


def printable(text: str) -> bool:
    """Whether there is a face with all of the text's characters: Latin letters, digits, punctuation and spaces."""
    latin = bool(_latin_faces())
    return all(
        " " <= letter <= "~" or (latin and "\u00a1" <= letter <= "\u017f" and letter != "\u00ad") for letter in text
    )


def draw_page(rng: random.Random, text: str) -> Image.Image:
    """An RGB image of `text`; white space becomes spaces. Letters that are not `printable` become boxes."""
    block = _block(rng, text)
    layout = rng.choice(sorted(LAYOUTS))
    image = LAYOUTS[layout](rng, block)
    return _worn(rng, image)


def draw_scene(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """An image without words, like a blurred photograph: colours that change slowly, and some shapes."""
    image = _noise(rng, 2, size)
    for cells, weight in ((5, 0.4), (13, 0.3), (40, 0.2)):
        image = Image.blend(image, _noise(rng, cells, size), weight * rng.random())
    draw = ImageDraw.Draw(image)
    for _ in range(rng.choice((0, 0, 1, 2, 4, 8))):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        width, height = rng.randint(8, max(9, size[0] // 2)), rng.randint(8, max(9, size[1] // 2))
        shape: Callable[..., None] = rng.choice((draw.ellipse, draw.rectangle))
        shape((x, y, x + width, y + height), fill=_colour(rng))
    return image


@dataclass(frozen=True)
class _Block:
    """Wrapped lines of text: the face, the font size and the line height in pixels, and the area that they need."""

    lines: tuple[str, ...]
    words: tuple[str, ...]
    font: ImageFont.FreeTypeFont
    leading: int
    width: int
    height: int


@cache
def _font(face: str | None, points: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(face, points) if face else ImageFont.load_default(points)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise TypeError("Pillow was built without FreeType: install a wheel of it")
    return font


@cache
def _latin_faces() -> tuple[str, ...]:
    """Paths of the fonts in matplotlib (extras `train` and `data`)."""
    try:
        from matplotlib import get_data_path
    except ImportError:
        return ()
    return tuple(str(Path(get_data_path()) / "fonts/ttf" / f"{face}.ttf") for face in _FACES)


def _faces(text: str) -> tuple[str | None, ...]:
    """The faces that have the text's letters; None is Pillow's own, which has ASCII."""
    return (None, *_latin_faces()) if text.isascii() or not _latin_faces() else _latin_faces()


def _block(rng: random.Random, text: str) -> _Block:
    """`text` in a random face, case and width, in the largest of the drawn font size and smaller ones that fits."""
    words = tuple(text.split())
    kind = rng.random()
    shown = (
        [word.upper() for word in words] if kind < 0.15 else [word.lower() for word in words] if kind < 0.2 else words
    )
    face = rng.choice(_faces(text))
    points = math.exp(rng.uniform(*map(math.log, POINTS)))
    width = math.exp(rng.uniform(*map(math.log, WIDTHS)))
    spacing = rng.uniform(1.1, 1.6)
    while True:
        font = _font(face, round(points))
        lines = _wrapped(shown, font, width)
        widest = math.ceil(max(map(font.getlength, lines), default=1))
        leading = round(spacing * points)
        height = leading * max(1, len(lines))
        # Long lines and high columns are both made shorter.
        if points <= POINTS[0] or ((widest + 40) * (height + 40) <= LARGEST and height <= 1.6 * max(width, widest)):
            return _Block(tuple(lines), words, font, leading, widest, height)
        points, width = max(POINTS[0], 0.85 * points), min(1.1 * width, 1.2 * WIDTHS[1])


def _wrapped(words: Sequence[str], font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines: list[str] = []
    for word in words:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _write(
    image: Image.Image,
    block: _Block,
    at: tuple[float, float],
    ink: Colour,
    align: float = 0,
    outline: Colour | None = None,
) -> None:
    """Write the block with its upper left corner at `at`; `align` 0 is flush left, 0.5 centred, 1 flush right."""
    draw = ImageDraw.Draw(image)
    positions = image.info.setdefault(WORDS, [])
    words = iter(block.words)
    for number, line in enumerate(block.lines):
        x = at[0] + align * (block.width - block.font.getlength(line))
        y = at[1] + number * block.leading
        stroke = 0 if outline is None else max(1, round(block.font.size / 14))
        draw.text((x, y), line, fill=ink, font=block.font, stroke_width=stroke, stroke_fill=outline)
        for match in re.finditer(r"\S+", line):
            edges = tuple(x + block.font.getlength(line[:end]) for end in range(match.start(), match.end() + 1))
            positions.append(Word(next(words), edges, y, y + 1.2 * block.font.size))


def _colour(rng: random.Random) -> Colour:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _lightness(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def _ink_and_paper(rng: random.Random) -> tuple[Colour, Colour]:
    """Two colours that can be told apart; half of the time black and white or nearly so."""
    if rng.random() < 0.5:
        dark, light = rng.randrange(50), 255 - rng.choice((0, 0, rng.randrange(40)))
        pair: tuple[Colour, Colour] = (dark, dark, dark), (light, light, light)
    else:
        pair = _colour(rng), _colour(rng)
        while abs(_lightness(pair[0]) - _lightness(pair[1])) < _CONTRAST:
            pair = _colour(rng), _colour(rng)
        pair = (pair[0], pair[1]) if _lightness(pair[0]) < _lightness(pair[1]) else (pair[1], pair[0])
    return pair if rng.random() < 0.7 else (pair[1], pair[0])


def _noise(rng: random.Random, cells: int, size: tuple[int, int]) -> Image.Image:
    grid = Image.frombytes("RGB", (cells, cells), rng.randbytes(3 * cells * cells))
    return grid.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class _Margins:
    """Pixels between a text and the edges of its image."""

    west: int
    north: int
    east: int
    south: int

    @classmethod
    def drawn(cls, rng: random.Random, least: int = 4) -> _Margins:
        most = least + rng.choice((6, 26, 86))
        return cls(*(rng.randint(least, most) for _ in range(4)))

    def around(self, block: _Block, rows: int = 0) -> tuple[int, int]:
        """Width and height of an image of the block with these margins, and of `rows` more lines."""
        return self.west + block.width + self.east, self.north + block.height + rows * block.leading + self.south


def _page(rng: random.Random, block: _Block) -> Image.Image:
    """Text on plain paper, at times numbered below as if a list were to be completed."""
    ink, paper = _ink_and_paper(rng)
    margins, rows = _Margins.drawn(rng), rng.choice((0, 0, 0, 3))
    image = Image.new("RGB", margins.around(block, rows), paper)
    _write(image, block, (margins.west, margins.north), ink)
    for row in range(rows):
        place = (margins.west, margins.north + block.height + row * block.leading)
        ImageDraw.Draw(image).text(place, f"{row + 1}.", fill=ink, font=block.font)
    return image


def _poster(rng: random.Random, block: _Block) -> Image.Image:
    """Centred text, at times in a frame."""
    ink, paper = _ink_and_paper(rng)
    across, down = rng.randint(16, 60), rng.randint(16, 90)
    image = Image.new("RGB", (block.width + 2 * across, block.height + 2 * down), paper)
    if rng.random() < 0.5:
        box = (6, 6, image.width - 7, image.height - 7)
        ImageDraw.Draw(image).rectangle(box, outline=ink, width=rng.randint(1, 5))
    _write(image, block, (across, down), ink, 0.5)
    return image


def _chat(rng: random.Random, block: _Block) -> Image.Image:
    """A message in a bubble, below a bar and beside empty bubbles."""
    ink, bubble = _ink_and_paper(rng)
    _, ground = _ink_and_paper(rng)
    pad, bar = rng.randint(8, 16), rng.choice((0, 24, 40))
    above, below = (rng.choice((0, 0, 36)) for _ in range(2))
    width = block.width + 2 * pad + rng.randint(20, 120)
    image = Image.new("RGB", (width, bar + above + block.height + 2 * pad + below + 24), ground)
    draw = ImageDraw.Draw(image)
    if bar:
        draw.rectangle((0, 0, width, bar), fill=_colour(rng))
    x, y = rng.choice((8, width - block.width - 2 * pad - 8)), bar + above + 12
    for top in ([bar + 6] if above else []) + ([y + block.height + 2 * pad + 6] if below else []):
        draw.rounded_rectangle((10, top, rng.randint(30, max(30, width - 10)), top + 26), radius=10, fill=_colour(rng))
    box = (x, y, x + block.width + 2 * pad, y + block.height + 2 * pad)
    draw.rounded_rectangle(box, radius=rng.randint(2, 18), fill=bubble)
    _write(image, block, (x + pad, y + pad), ink)
    return image


def _screenshot(rng: random.Random, block: _Block) -> Image.Image:
    """A window with a title bar and buttons; grey lines stand for text that cannot be read."""
    ink, paper = _ink_and_paper(rng)
    bar, lines = rng.randint(18, 40), rng.choice((0, 2, 4))
    margins = replace(_Margins.drawn(rng), north=bar + 12 + 10 * lines)
    image = Image.new("RGB", margins.around(block), paper)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, image.width, bar), fill=_colour(rng))
    for number in range(3):
        draw.ellipse((8 + 16 * number, bar // 2 - 5, 18 + 16 * number, bar // 2 + 5), fill=_colour(rng))
    for number in range(lines):
        y = bar + 8 + 10 * number
        end = rng.randint(margins.west + 10, max(margins.west + 10, image.width - 4))
        draw.line((margins.west, y, end, y), fill="#9a9a9a", width=3)
    _write(image, block, (margins.west, margins.north), ink)
    return image


def _over(rng: random.Random, block: _Block) -> Image.Image:
    """Text over a scene: outlined like a caption, or on a panel like a sign."""
    margins = _Margins.drawn(rng, 24)
    image = draw_scene(rng, margins.around(block))
    ink, paper = _ink_and_paper(rng)
    x, y, align = margins.west, margins.north, rng.choice((0, 0.5))
    if rng.random() < 0.5:
        _write(image, block, (x, y), ink, align, outline=paper)
        return image
    box = (x - 12, y - 8, x + block.width + 12, y + block.height + 8)
    ImageDraw.Draw(image).rectangle(box, fill=paper, outline=rng.choice((ink, paper)), width=3)
    _write(image, block, (x, y), ink, align)
    return image


LAYOUTS: dict[str, Callable[[random.Random, _Block], Image.Image]] = {
    "chat": _chat,
    "over": _over,
    "page": _page,
    "poster": _poster,
    "screenshot": _screenshot,
}


def _worn(rng: random.Random, image: Image.Image) -> Image.Image:
    """The image, at times rotated, blurred or compressed; words keep their positions up to the rotation."""
    words = image.info.get(WORDS, [])
    if rng.random() < ROTATED:
        turn = rng.uniform(-_TURN, _TURN)
        turned = image.rotate(turn, Image.Resampling.BICUBIC, expand=True, fillcolor=image.getpixel((1, 1)))
        words = _turned(words, turn, image.size, turned.size)
        image = turned
    if rng.random() < BLURRED:
        scale = rng.uniform(0.55, 0.9)
        small = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
    if rng.random() < COMPRESSED:
        stored = io.BytesIO()
        image.save(stored, "JPEG", quality=rng.randint(25, 90))
        image = Image.open(stored).convert("RGB")
    image.info = {WORDS: words}
    return image


def _turned(words: Sequence[Word], degrees: float, before: tuple[int, int], after: tuple[int, int]) -> list[Word]:
    """The words' positions once an image of size `before` was rotated counter-clockwise and enlarged to `after`.

    Each word's box moves as a whole.
    """
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    turned = []
    for word in words:
        across = (word.edges[0] + word.edges[-1] - before[0]) / 2
        down = (word.top + word.bottom - before[1]) / 2
        shift = across * cosine + down * sine - across + (after[0] - before[0]) / 2
        fall = down * cosine - across * sine - down + (after[1] - before[1]) / 2
        edges = tuple(edge + shift for edge in word.edges)
        turned.append(Word(word.text, edges, word.top + fall, word.bottom + fall))
    return turned
