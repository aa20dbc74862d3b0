"""Reads the words printed in an image, with RapidOCR's models, which its package contains.

Large print is searched in the whole image, small print in overlapping parts of it. An image with too many parts is
reduced first, so that its smallest print is lost (docs/security.md). The lines are then read one by one, because a
batch would be padded to its longest line. A *box* is the four corners of a line of text.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice, product
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from guardreasoner_vl.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    import numpy as np

    from guardreasoner_vl.types import CheckedImage

    Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
    Box: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

MOST_TEXT = 4000
"""Most text in an image: the sum of its lines' lengths, each in heights of the line. A full printed page has 2,700, and
it takes about 20 s on 2 cores."""

LARGEST = 4_000_000
"""Area in pixels that a larger image is reduced to, unless at most `MOST_PARTS` of its parts are not plain."""

PART, OVERLAP = 960, 160
"""Side of a part and overlap of neighbouring parts, in pixels. A larger image is also searched in parts."""

MOST_PARTS = 12
"""An image larger than `LARGEST` is searched at full size if at most this many of its parts are not plain."""

_PLAIN = 9  # of 255: a part whose pixels differ by less in every channel holds no print
_SMALLEST = 32  # pixels on a side; the models refuse smaller ones
_CONFIDENCE = 0.5  # mean over a line's letters; a line below it is a pattern, not text
_KNOWN = 0.3  # a box of which more than this share lies in another box repeats it
_LONGEST = 30  # a line longer than this many times its height is read in pieces
_LEGIBLE = 20  # pixels: lines at least this high in the reduced image are taken from it, lower ones from the parts


class _Bounds(NamedTuple):
    """The smallest and the largest x and y of a box, in pixels."""

    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def of(cls, box: Box) -> _Bounds:
        return cls(*map(float, box.min(0)), *map(float, box.max(0)))

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0

    def shared(self, other: _Bounds) -> tuple[float, float]:
        """Width and height of the intersection with `other`; one is negative if there is none."""
        return min(self.x1, other.x1) - max(self.x0, other.x0), min(self.y1, other.y1) - max(self.y0, other.y0)


_reader = ThreadPoolExecutor(1, "ocr")  # the models store a call's options, so calls must not overlap


def start_reading(image: CheckedImage) -> Future[str]:
    """Run `printed_text` in a thread; images are read one after another."""
    return _reader.submit(printed_text, image)


def printed_text(image: CheckedImage) -> str:
    """The words in `image`, from top to bottom; empty if there are none.

    The lines are joined by spaces: where they end depends on the image's width and not on the text. Raises `ImageError`
    if the text exceeds `MOST_TEXT`.
    """
    pixels = _prepared(image)
    boxes = _boxes(pixels)
    if sum(map(_length, boxes)) > MOST_TEXT:
        raise ImageError("the image has more text than a printed page: send its parts as images of their own")
    return " ".join(filter(None, (_line_text(pixels, box) for box in boxes)))


def _prepared(image: CheckedImage) -> Pixels:
    """The image's pixels, of shape (height, width, 3) in the order blue, green, red.

    A large image is reduced to `LARGEST` (see `MOST_PARTS`), a small one padded to `_SMALLEST`.
    """
    import numpy as np

    opened = image.open()
    scale = math.sqrt(LARGEST / (opened.width * opened.height))
    if scale < 1 and len(list(islice(_textured_parts(np.asarray(opened)), MOST_PARTS + 1))) > MOST_PARTS:
        opened = opened.resize((max(1, round(opened.width * scale)), max(1, round(opened.height * scale))))
    return _padded_pixels(np.asarray(opened)[:, :, ::-1])


def _padded_pixels(pixels: Pixels) -> Pixels:
    import numpy as np

    height, width, _ = pixels.shape
    missing = (0, max(0, _SMALLEST - height)), (0, max(0, _SMALLEST - width)), (0, 0)
    return np.ascontiguousarray(np.pad(pixels, missing, "edge"))


def _textured_parts(pixels: Pixels) -> Iterator[tuple[int, int, Pixels]]:
    """Yield (x, y, pixels) of each overlapping part that is not plain; x and y are those of its first pixel."""
    height, width, _ = pixels.shape
    for y, x in product(_starts(height), _starts(width)):
        part = pixels[y : y + PART, x : x + PART]
        if (part.max(0).max(0) - part.min(0).min(0)).max() >= _PLAIN:
            yield x, y, part


def _boxes(pixels: Pixels) -> list[Box]:
    """The box of each line of text, of shape (4, 2) in pixels (x, y), from top to bottom."""
    import numpy as np

    height, width, _ = pixels.shape
    boxes = _detected(pixels)
    reduction = max(height, width) / PART
    if reduction > 1:
        boxes = [box for box in boxes if _height(box) >= _LEGIBLE * reduction]
        in_parts: list[Box] = []
        for x, y, part in _textured_parts(pixels):
            for box in _detected(part):
                _add(box + np.array([x, y], np.float32), in_parts)
        boxes += _unknown(in_parts, boxes)
    return _in_reading_order(boxes)


def _unknown(in_parts: list[Box], boxes: list[Box]) -> list[Box]:
    """The boxes of `in_parts` that do not repeat a line of `boxes`, which are those of the whole image.

    A box of the whole image can be a block of several small lines. The boxes inside one are therefore left out only if
    each of them lies in one that is more than half as high as that box.
    """
    for known in boxes:
        covered: list[Box] = []
        others: list[Box] = []
        for box in in_parts:
            (covered if _covered(box, known) else others).append(box)
        high = [box for box in covered if _height(box) > min(_height(known), PART) / 2]
        if all(any(_covered(box, line) for line in high) for box in covered):
            in_parts = others
    return in_parts


def _add(box: Box, boxes: list[Box]) -> None:
    """Add a box of a part to those of other parts: merge it with a box of the same line, drop it if one covers it."""
    import numpy as np

    for number, other in enumerate(boxes):
        if _continues(box, other):
            (x0, y0), (x1, y1) = np.minimum(box, other).min(0), np.maximum(box, other).max(0)
            del boxes[number]
            _add(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float32), boxes)
            return
        if _covered(box, other):
            return
    boxes.append(box)


def _continues(box: Box, other: Box) -> bool:
    """Whether two boxes overlap and are pieces of one horizontal line."""
    first, second = _Bounds.of(box), _Bounds.of(other)
    level = all(bounds.height < 1.5 * _height(each) for bounds, each in ((first, box), (second, other)))
    width, height = first.shared(second)
    return level and width > 0 and height > 0.6 * max(first.height, second.height)


def _covered(box: Box, known: Box) -> bool:
    """Whether more than `_KNOWN` of the area of a box lies in `known`, both taken as upright rectangles."""
    bounds = _Bounds.of(box)
    width, height = bounds.shared(_Bounds.of(known))
    return min(width, height) > 0 and width * height > _KNOWN * bounds.width * bounds.height


def _in_reading_order(boxes: list[Box]) -> list[Box]:
    """Sort the boxes from top to bottom, and from left to right within a row.

    A box belongs to the row above it if its middle lies above the lower edge of that row's first box.
    """
    rows: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: float(box[:, 1].mean())):
        if rows and box[:, 1].mean() < rows[-1][0][:, 1].max():
            rows[-1].append(box)
        else:
            rows.append([box])
    return [box for row in rows for box in sorted(row, key=lambda box: float(box[:, 0].min()))]


def _detected(pixels: Pixels) -> list[Box]:
    import numpy as np

    boxes = _models()(_padded_pixels(pixels), use_det=True, use_cls=False, use_rec=False).boxes
    return [] if boxes is None else [np.asarray(box, np.float32) for box in boxes]


def _starts(length: int) -> Iterator[int]:
    """Where the parts of a side of `length` pixels start."""
    count = 1 if length <= PART else math.ceil((length - OVERLAP) / (PART - OVERLAP))
    return (round(number * (length - PART) / max(1, count - 1)) for number in range(count))


def _height(box: Box) -> float:
    """The height of a line in pixels, for a vertical line its width."""
    return max(1.0, min(math.dist(box[0], box[1]), math.dist(box[1], box[2])))


def _length(box: Box) -> float:
    """The length of a line, as a multiple of its height."""
    return max(math.dist(box[0], box[1]), math.dist(box[1], box[2])) / _height(box)


def _line_text(pixels: Pixels, box: Box) -> str:
    from rapidocr.utils.process_img import get_rotate_crop_image

    pieces = [
        _models()(piece, use_det=False, use_cls=True, use_rec=True)
        for piece in _line_pieces(get_rotate_crop_image(pixels, box))
    ]
    return " ".join(piece.txts[0].strip() for piece in pieces if piece.txts and piece.scores[0] >= _CONFIDENCE)


def _line_pieces(line: Pixels) -> Iterator[Pixels]:
    """Cut a line into pieces of at most `_LONGEST` heights, at gaps between letters; longer pieces would be misread."""
    import numpy as np

    height, width, _ = line.shape
    longest = _LONGEST * height
    while width > longest:
        contrast = np.ptp(line[:, longest // 2 : longest].mean(2), axis=0)
        gap = max(1, height // 3)
        cut = longest // 2 + gap // 2 + int(np.convolve(contrast, np.ones(gap), "valid").argmin())
        yield np.ascontiguousarray(line[:, :cut])
        line, width = line[:, cut:], width - cut
    yield np.ascontiguousarray(line)


@cache
def _models() -> Any:
    """RapidOCR's models, loaded once: loading takes 0.9 s."""
    from rapidocr import RapidOCR

    threads = os.environ.get("OMP_NUM_THREADS", "")
    return RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.max_side_len": 32 * PART,  # a long line is not reduced
            "Det.limit_type": "max",
            "Det.limit_side_len": PART,
            "EngineConfig.onnxruntime.intra_op_num_threads": int(threads) if threads.isdecimal() else -1,
        }
    )
