"""The inputs that a newcomer tries first: the examples of the demonstration and of the service's page, labelled."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.benchmarks.find import from_samples
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.storage.atomic import writing
from guardreasoner_vl.types import Modality, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark
    from guardreasoner_vl.types import GoldLabel

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo.jsonl"
PAGE = ROOT / "src" / "guardreasoner_vl" / "service" / "page" / "page.html"
LABELS: dict[str, tuple[GoldLabel, GoldLabel | None]] = {
    "text, harmless": ("unharmful", None),
    "text, harmful": ("harmful", None),
    "text with an answer that refuses": ("harmful", "unharmful"),
    "text with a harmless answer": ("unharmful", "unharmful"),
    "image, harmless": ("unharmful", None),
    "image, harmful": ("harmful", None),
    "image and text, harmless": ("unharmful", None),
    "image and text, harmful": ("harmful", None),
    "Bread recipe": ("unharmful", None),
    "An insult": ("harmful", None),
    "An answered question": ("unharmful", "unharmful"),
    "An image with text": ("unharmful", None),
    "A forged verdict": ("unharmful", None),
    "Markup": ("unharmful", "unharmful"),
}
"""Labels of request and response, by the row's id in the demonstration or the button's text on the page."""


def examples(work: Path) -> LoadedBenchmark:
    """All examples, with the page's image drawn below `work`. Raises `DataError` for an example without labels."""
    rows = [*_demo(), *_page(work)]
    return from_samples("examples", rows, DEMO, SkippedRows())


def _demo() -> Iterator[Sample]:
    for line in DEMO.read_text("utf-8").splitlines():
        row = json.loads(line)
        images = [str(DEMO.parent / name) for name in row.get("images", ())]
        yield _sample(row["id"], row.get("prompt", ""), row.get("response"), images)


def _page(work: Path) -> Iterator[Sample]:
    reader = _Buttons()
    reader.feed(PAGE.read_text("utf-8"))
    for name, data in reader.buttons:
        image = data.get("data-image")
        images = [str(_drawn(image, work / "page-example.png"))] if image else []
        yield _sample(name, data.get("data-prompt") or "", data.get("data-response"), images)


def _sample(name: str, prompt: str, response: str | None, images: list[str]) -> Sample:
    if name not in LABELS:
        raise DataError(f"the example {name!r:.60} has no labels; add them to LABELS in {Path(__file__).name}")
    request_label, response_label = LABELS[name]
    modality: Modality = ("text-image" if prompt else "image") if images else "text"
    return Sample(
        id=name,
        source="examples",
        split="test",
        modality=modality,
        prompt=prompt,
        images=tuple(images),
        response=response,
        request_label=request_label,
        response_label=response_label,
    )


def _drawn(text: str, path: Path) -> Path:
    """Draw the note as `page.js` does."""
    image = Image.new("RGB", (480, 300), "#fdf6dd")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(36)
    for number, line in enumerate(text.split("\n")):
        draw.text((40, 85 + 70 * number), line, fill="#2b2b2b", font=font, anchor="ls")
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        image.save(path)
    return path


class _Buttons(HTMLParser):
    """The page's example buttons: each one's text and its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.buttons: list[tuple[str, dict[str, str | None]]] = []
        self._data: dict[str, str | None] | None = None
        self._text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "button" and any(name.startswith("data-") for name, _ in attrs):
            self._data, self._text = dict(attrs), ""

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "button" and self._data is not None:
            self.buttons.append((" ".join(self._text.split()), self._data))
            self._data = None
