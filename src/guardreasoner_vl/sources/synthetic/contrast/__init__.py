"""Synthetic contrast pairs: alarming words in harmless use, and harmful aims in the same sentence frames.

All content is made up and mild: an aim is named, never a way to reach it. The files in `texts/` define texts, kinds and
languages. Frames, openings and stories are shared by both labels, so that they do not reveal the label.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.sources.synthetic.contrast.answers import answered
from guardreasoner_vl.sources.synthetic.contrast.requests import Request, requested
from guardreasoner_vl.sources.synthetic.contrast.texts import languages, lines
from guardreasoner_vl.sources.synthetic.images import write_rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HARMFUL = 0.48
"""Share of harmful requests."""

ANSWERED = 0.4
ENGLISH, MAIN_OTHERS = 0.7, 0.45
"""Shares of English among all rows, and of the languages `MAIN` among the rest."""

LENGTH = 0.7
"""Exponent of a line's length in its weight, so that a request's length does not reveal its label."""

MAIN = ("de", "es", "fr", "zh")
"""The languages with the most texts after English."""

TRIES = 8
"""Maximum number of draws for a request that was not written before."""


def write_folder(folder: Path, count: int, seed: int) -> Path:
    """Write `count` rows in the layout of `sources.jsonl`; the same seed gives the same bytes."""
    rng = random.Random(f"{seed}-contrast")
    return write_rows(folder, ((None, row) for row in _rows(rng, count, seed)))


def _rows(rng: random.Random, count: int, seed: int) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for number in range(count):
        for _ in range(TRIES):
            request = draw_request(rng)
            if request.text not in seen:
                break
        seen.add(request.text)
        yield exchange(rng, request, f"contrast-{seed}-{number:06d}")


def draw_request(rng: random.Random) -> Request:
    """A request with random language, kind (weighted by its number of patterns) and label."""
    language = _language(rng)
    kinds = lines(language)
    weights = [len(labels["harmful"]) + len(labels["unharmful"]) for labels in kinds.values()]
    kind = rng.choices(list(kinds), weights)[0]
    label = "harmful" if rng.random() < HARMFUL else "unharmful"
    rows = kinds[kind][label]
    # Harmful lines tend to be longer, so long harmless lines and short harmful ones are drawn more often.
    power = -LENGTH if label == "harmful" else LENGTH
    line = rng.choices(rows, [len(row.text) ** power for row in rows])[0]
    return requested(rng, line, languages()[language])


def _language(rng: random.Random) -> str:
    if rng.random() < ENGLISH:
        return "en"
    others = [code for code in languages() if code not in ("en", *MAIN)]
    return rng.choice(MAIN if rng.random() < MAIN_OTHERS else others)


def exchange(rng: random.Random, request: Request, sample_id: str) -> dict[str, Any]:
    """The row of a request; two of five rows have a response."""
    answer = answered(rng, request) if rng.random() < ANSWERED else None
    category = request.line.category or (answer.category if answer else "")
    of = "request" if request.line.category else "response"
    meta = {"kind": request.line.group.kind, "language": request.language.language}
    return {
        "id": sample_id,
        "source": "contrast",
        "modality": "text",
        "prompt": request.text,
        "response": answer.text if answer else None,
        "request_label": request.line.label,
        "response_label": answer.label if answer else None,
        "meta": {**meta, "category": category, "category_of": of} if category else meta,
    }
