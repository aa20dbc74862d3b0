"""Reads the words printed in an image, with RapidOCR's models, which its package contains.

Lines are found in the whole image and then read one by one: a batch would be padded to its longest line.
"""

from __future__ import annotations

import os
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

from guardreasoner_vl.errors import ImageError

if TYPE_CHECKING:
    import numpy as np

    from guardreasoner_vl.types import CheckedImage

MAX_LINES = 200
"""Most lines of an image; a printed page has some sixty, and a line of 100 letters takes 0.15 s on 2 cores."""

LONGEST_SIDE = 1280
"""A larger image is reduced to this many pixels while lines are searched; they are read in its full size."""

_CONFIDENCE = 0.5  # of a line's letters, on average; below it, it is a pattern and no text
_IN_USE = Lock()  # the models keep a call's options

Pixels: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"


def printed_text(image: CheckedImage) -> str:
    """The words in `image` in one line, from top to bottom; empty if there are none.

    Where a line of an image ends depends on the image's width and not on the text. Raises `ImageError` if there are
    more than `MAX_LINES` lines.
    """
    import numpy as np

    pixels = np.ascontiguousarray(np.asarray(image.open())[:, :, ::-1])  # blue, green, red
    with _IN_USE:
        lines = _lines(_models(), pixels)
    return " ".join(filter(None, lines))


def _lines(models: Any, pixels: Pixels) -> list[str]:
    import numpy as np
    from rapidocr.utils.process_img import get_rotate_crop_image

    boxes = models(pixels, use_det=True, use_cls=False, use_rec=False).boxes
    if boxes is None:
        return []
    if len(boxes) > MAX_LINES:
        raise ImageError(f"the image has more than {MAX_LINES} lines of text: send its parts as images of their own")
    parts = (get_rotate_crop_image(pixels, np.asarray(box, np.float32)) for box in boxes)
    read = [models(part, use_det=False, use_cls=True, use_rec=True) for part in parts]
    return [line.txts[0].strip() for line in read if line.txts and line.scores[0] >= _CONFIDENCE]


@cache
def _models() -> Any:
    """The models, loaded once in 0.9 s."""
    from rapidocr import RapidOCR

    threads = os.environ.get("OMP_NUM_THREADS", "")
    return RapidOCR(
        params={
            "Global.log_level": "critical",
            "Det.limit_type": "max",
            "Det.limit_side_len": LONGEST_SIDE,
            "EngineConfig.onnxruntime.intra_op_num_threads": int(threads) if threads.isdigit() else -1,
        }
    )
