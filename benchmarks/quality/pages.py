"""Short requests of the lists as images of printed text, in several sizes."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from benchmarks.quality.lists import LABELS, request_list, spread
from guardreasoner_vl.evaluation.benchmarks.find import from_samples
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.storage.atomic import writing

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark
    from guardreasoner_vl.types import Sample

SIZES = (12, 16, 24, 32, 40)
"""Font sizes in pixels."""
LONGEST = 60
"""Longest request that is rendered, in characters."""
WIDTH, MARGIN = 336, 14


def pages(size: int, count: int, work: Path) -> LoadedBenchmark:
    """`count` requests of each list, rendered below `work` in black on white; the image is the whole request."""
    rows = []
    for name in LABELS:
        short = [row for row in request_list(name).samples if row.prompt.isascii() and len(row.prompt) <= LONGEST]
        rows += [_drawn(row, size, work) for row in spread(short, count)]
    return from_samples(f"pages of {size} pixels", rows, work, SkippedRows())


def _drawn(row: Sample, size: int, work: Path) -> Sample:
    font = ImageFont.load_default(size)
    letter = font.getlength("abcdefghijklmnopqrstuvwxyz") / 26
    lines = textwrap.wrap(row.prompt, max(10, int((WIDTH - 2 * MARGIN) / letter)))
    leading = round(1.3 * size)
    page = Image.new("RGB", (WIDTH, 2 * MARGIN + leading * len(lines)), "white")
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * leading), line, fill="black", font=font)
    path = work / "pages" / f"{row.id}-{size}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        page.save(path)
    return row.model_copy(update={"prompt": "", "images": (str(path),), "modality": "image"})
