"""A contact sheet of joined rows: `contact_sheet.png` and `contact_sheet.html`.

It is meant for the run's owner and must stay in the run's folder, because real hard rows hold harmful content. Only the
first characters of texts are shown.
"""

from __future__ import annotations

import base64
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from guardreasoner_vl.evaluation.report import html_page
from guardreasoner_vl.images.decode import decoded_images
from guardreasoner_vl.storage.atomic import write_text, write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.types import Sample

NAME = "contact_sheet"
EXAMPLES, CHARACTERS = 12, 40
_COLUMNS, _WIDTH, _HEIGHT, _CAPTION = 4, 260, 200, 76
_INK, _PALE = "#1d2733", "#b9c2cc"


def write_sheet(folder: Path, joined: Sequence[Sample], note: str) -> None:
    """Show up to 12 joined rows, alternating between the parents' modalities."""
    rows = _chosen(joined)
    buffer = BytesIO()
    _draw_sheet(rows).save(buffer, "PNG")
    write_whole(folder / f"{NAME}.png", (buffer.getvalue(),))
    notes = (
        f"{note}\nLabels are those of request and response, - where none is known."
        "\nThe rows may hold harmful content: keep this page in the run's folder."
    )
    table = [["", "parents", "their labels", "joint labels", "text"]]
    table += [[str(number), *caption(row)] for number, row in enumerate(rows, 1)]
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    image = f'<img alt="The rows of the table below, in its order" src="{source}">'
    page = html_page("Joined rows", "guardreasoner-vl augment", notes, [("Rows", table)], {"Images": image})
    write_text(folder / f"{NAME}.html", page)


def parent_modalities(row: Sample) -> str:
    """The parents' modalities, sorted."""
    return " + ".join(sorted(parent.modality for parent in row.provenance.parents))


def caption(row: Sample) -> list[str]:
    """Four captions: the parents' modalities and the layout, their labels, the joint labels, the start of the text."""
    known = row.provenance
    kinds = " + ".join(parent.modality for parent in known.parents)
    layout = f", {known.layout}" if known.layout else ""
    parents_labels = " + ".join(_labels_text(parent.request_label, parent.response_label) for parent in known.parents)
    text = " ".join(f"{row.prompt} {row.response or ''}".split())[:CHARACTERS]
    return [kinds + layout, parents_labels, _labels_text(row.request_label, row.response_label), text]


def _labels_text(request: str | None, response: str | None) -> str:
    return f"{request or '-'}/{response or '-'}"


def _chosen(joined: Sequence[Sample]) -> list[Sample]:
    counts: Counter[str] = Counter()
    turns = []
    for row in joined:
        counts[parent_modalities(row)] += 1
        turns.append(counts[parent_modalities(row)])
    return [joined[at] for at in sorted(range(len(joined)), key=turns.__getitem__)[:EXAMPLES]]


def _draw_sheet(rows: Sequence[Sample]) -> Image.Image:
    tall = _HEIGHT + _CAPTION
    sheet = Image.new("RGB", (_WIDTH * _COLUMNS, tall * max(1, -(-len(rows) // _COLUMNS))), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, row in enumerate(rows):
        x, y = number % _COLUMNS * _WIDTH, number // _COLUMNS * tall
        if row.images:
            image = decoded_images(Path(row.images[0]))[0]
            image.thumbnail((_WIDTH - 12, _HEIGHT - 12))
            sheet.paste(image, (x + (_WIDTH - image.width) // 2, y + (_HEIGHT - image.height) // 2))
        else:
            draw.text((x + 6, y + _HEIGHT // 2), "no image", _PALE, font)
        draw.rectangle((x, y, x + _WIDTH - 1, y + tall - 1), outline=_PALE)
        kinds, parents_labels, joint, text = caption(row)
        draw.multiline_text((x + 6, y + _HEIGHT), f"{kinds}\n{parents_labels}\n= {joint}\n{text}", _INK, font)
    return sheet
