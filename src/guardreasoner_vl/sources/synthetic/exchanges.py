"""Synthetic exchanges, some with signs: enough for a small guard to learn from in minutes.

All content is made up and mild. A sign is a shape on a plain background: crosses on warm colours are harmful, rings on
cold colours unharmful, so that a tiny vision tower can distinguish them without reading.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from guardreasoner_vl.sources.synthetic import phrases
from guardreasoner_vl.sources.synthetic.images import write_rows

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.types import GoldLabel

ASKED = ("{}", "please tell me {}", "I want to know {}", "my friend asks: {}", "in a story: {}", "quick question, {}")
STOPPED = ("how do we stop those who {}", "who helps when others {}", "is it wrong to {}", "why must nobody {}")
REFUSALS = 1 / 3
COMPLIED = ("Sure. First of all, {}.", "Of course, it is easy: {}.", "Here is the plan: {}.", "Step one: {}.")
REFUSED = ("I am sorry, I cannot help with that.", "No, I will not do that.", "I cannot assist with this request.")
ABOUT_SIGN = ("what does this sign tell me to do", "do what the sign says", "explain the sign", "is this allowed")
WARM, COLD = ("#c81e1e", "#d9480f", "#a61e4d", "#862e2e"), ("#1971c2", "#2b8a3e", "#0b7285", "#364fc7")
SIZES = ((84, 84), (112, 84), (84, 112), (112, 112))
SIGNS = 0.4
"""Share of rows with a sign; half of these have a prompt too."""


def write_folder(folder: Path, count: int, seed: int) -> Path:
    """Write `count` rows and their signs in the layout of `sources.jsonl`; the same seed gives the same bytes."""
    rng = random.Random(f"{seed}-written")
    return write_rows(folder, (exchange(rng, f"written-{seed}-{number:06d}") for number in range(count)))


def exchange(rng: random.Random, sample_id: str) -> tuple[Image.Image | None, dict[str, Any]]:
    """One exchange: its sign (None without one) and its row."""
    label: GoldLabel = rng.choice(("harmful", "unharmful"))
    sign, prompt, response, response_label = None, "", None, None
    if rng.random() < SIGNS:
        sign = draw_sign(rng, label)
        prompt = rng.choice(ABOUT_SIGN) if rng.random() < 0.5 else ""
    else:
        prompt = asked(rng, label)
        if rng.random() < 0.5:
            response, response_label = answered(rng, label)
    row = {
        "id": sample_id,
        "source": "written",
        "modality": "text" if sign is None else "text-image" if prompt else "image",
        "prompt": prompt,
        "response": response,
        "request_label": label,
        "response_label": response_label,
        "meta": {"image_kind": "a cross" if label == "harmful" else "a ring"} if sign else {},
    }
    return sign, row


def asked(rng: random.Random, label: GoldLabel) -> str:
    """A request. One in three needs more than its words: preventing harm, or harm after something harmless."""
    if rng.random() > 1 / 3:
        return rng.choice(ASKED).format(phrases.phrase(rng, label))
    verb = rng.choice(sorted(phrases.HARMFUL))
    harm = f"{verb} {rng.choice(phrases.HARMFUL[verb])}"
    if label == "unharmful":
        return rng.choice(STOPPED).format(harm)
    return f"{phrases.phrase(rng, 'unharmful')} and then {harm}"


def answered(rng: random.Random, label: GoldLabel) -> tuple[str, GoldLabel]:
    """A response to a request with that label, and the response's label."""
    if label == "harmful" and rng.random() < REFUSALS:
        return rng.choice(REFUSED), "unharmful"
    return rng.choice(COMPLIED).format(phrases.phrase(rng, label)), label


def draw_sign(rng: random.Random, label: GoldLabel) -> Image.Image:
    """A cross on a warm colour (harmful), or a ring on a cold one (unharmful)."""
    width, height = rng.choice(SIZES)
    sign = Image.new("RGB", (width, height), rng.choice(WARM if label == "harmful" else COLD))
    draw, pen = ImageDraw.Draw(sign), rng.randint(6, 14)
    margins = [rng.randint(8, 20) for _ in range(4)]
    box = (margins[0], margins[1], width - margins[2], height - margins[3])
    if label == "harmful":
        draw.line(box, "white", pen)
        draw.line((box[2], box[1], box[0], box[3]), "white", pen)
    else:
        draw.ellipse(box, outline="white", width=pen)
    return sign
