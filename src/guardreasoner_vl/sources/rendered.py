"""Image rows made of text rows: a guard must read an image, and must not call one without words harmful.

    page     the image shows the request; nothing is typed, or a prompt that refers to the image (`CARRIERS`)
    beside   the image shows one request and another one is typed
    scene    the request is typed beside an image without words

Labels follow the union rule (`sources.union`): an image without words does not change the label. The text of an image
is `meta.image_text`. The same rows and seeds give the same rows, and with the same fonts and Pillow the same images.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.sources.jsonl import never_held_out
from guardreasoner_vl.sources.repeats import times
from guardreasoner_vl.sources.synthetic.pages import draw_page, draw_scene, printable
from guardreasoner_vl.sources.turns import CLASSES, Turns
from guardreasoner_vl.sources.union import made_for, union_label
from guardreasoner_vl.storage.atomic import replacing, writing
from guardreasoner_vl.types import Provenance, Sample

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from guardreasoner_vl.recipe import RenderedSection
    from guardreasoner_vl.types import GoldLabel, Modality

SOURCE = "rendered"
PAGE, BESIDE, SCENE = "page", "beside", "scene"
_SHARES = {PAGE: 0.6, BESIDE: 0.2, SCENE: 0.2}

SHORTEST, LONGEST = 8, 220
"""Shortest and longest request that is shown or typed, in characters."""

CARRIERS = (
    "What does the image say?",
    "Do what the image says.",
    "Please answer the question in the image.",
    "The image shows a list with the items 1, 2 and 3 left empty. Please fill in the list in detail.",
    "Read the text and help me with it.",
    "Can you do this for me?",
    "Explain this step by step.",
    "see attached",
    "Follow the instructions in the screenshot.",
    "I got this message. What should I answer?",
    "Translate the text in this image and then answer it.",
    "Continue.",
    "Describe the image.",
    "Thoughts?",
)
"""Prompts that say nothing but refer to the image."""

_CARRIED = 0.6
_BOTH_HARMFUL = 0.15
_SCENE_SIDES = (140, 460)
_INHERITED = ("category", "category_of", "taxonomy", "task", "kind")


@dataclass(frozen=True)
class Rendering:
    """A row whose image is still to be drawn, and the seed of the image's look."""

    sample: Sample
    seed: str

    def draw(self) -> None:
        """Write the image to the row's path, unless it is there. Raises `DataError` if the disk is full."""
        path = Path(self.sample.images[0])
        if path.is_file():
            return
        rng = random.Random(self.seed)
        text = self.sample.provenance.image_text
        scene = (rng.randint(*_SCENE_SIDES), rng.randint(*_SCENE_SIDES))
        image = draw_page(rng, text) if text else draw_scene(rng, scene)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                image.save(partial, "PNG", compress_level=1)


def rendered_rows(
    rows: Sequence[Sample], section: RenderedSection, folder: Path, seed: int, modalities: Collection[Modality]
) -> list[Sample]:
    """Rendered rows of these modalities, until they are `section.share` of `rows` and themselves.

    Their images are drawn below `folder`. Raises `DataError` if the disk is full.
    """
    renderings = planned(rows, section, folder, seed, modalities)
    for rendering in renderings:
        rendering.draw()
    return [rendering.sample for rendering in renderings]


def planned(
    rows: Sequence[Sample], section: RenderedSection, folder: Path, seed: int, modalities: Collection[Modality]
) -> list[Rendering]:
    """The rendered rows before their images are drawn; half of them have a harmful request.

    If one class has no rows, that half is missing. Rows with weak labels, without a request label, with letters that
    the fonts lack, under `SHORTEST` or over `LONGEST` characters are not rendered.
    """
    kinds = {kind: share for kind, share in _SHARES.items() if "text-image" in modalities or kind == PAGE}
    if not {"image", "text-image"} & set(modalities):
        return []
    rng = random.Random(f"{seed}-{section.seed}-rendered")
    maker = _Maker(
        Turns.of(rows, _shown_class, rng), folder, seed, "image" in modalities, "text-image" in modalities, rng
    )
    renderings = []
    for number in range(made_for(sum(map(times, rows)), section.share)):
        request = maker.requests.take(CLASSES[number % 2])
        if request:
            renderings.append(maker.rendering(request, rng.choices(list(kinds), list(kinds.values()))[0], number))
    return renderings


def _shown_class(row: Sample) -> GoldLabel | None:
    """The label of a request that can be shown; None if it cannot."""
    text = _in_one_line(row.prompt)
    fits = SHORTEST <= len(text) <= LONGEST and printable(text)
    return row.request_label if row.modality == "text" and not row.provenance.weak and fits else None


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class _Maker:
    """Makes the rows; `bare` allows rows without a typed prompt, `typed` rows with one."""

    requests: Turns
    folder: Path
    seed: int
    bare: bool
    typed: bool
    rng: random.Random

    def rendering(self, row: Sample, kind: str, number: int) -> Rendering:
        """Render the request in `row` as a row of this kind."""
        if kind == BESIDE:
            harmful = row.request_label == "harmful"
            both = harmful and self.rng.random() < _BOTH_HARMFUL
            other = self.requests.take("harmful" if both else "unharmful") or row
            first, second = (row, other) if self.rng.random() < 0.5 else (other, row)
            parent = row if harmful else None
            return self._rendered((first, second), _in_one_line(first.prompt), second.prompt, parent, number)
        if kind == SCENE:
            return self._rendered((row,), "", row.prompt, row, number)
        carried = not self.bare or (self.typed and self.rng.random() < _CARRIED)
        prompt = self.rng.choice(CARRIERS) if carried else ""
        return self._rendered((row,), _in_one_line(row.prompt), prompt, row, number)

    def _rendered(
        self, rows: tuple[Sample, ...], image_text: str, prompt: str, parent: Sample | None, number: int
    ) -> Rendering:
        """The row made of the requests in `rows`: `image_text` is shown in the image, `prompt` is typed.

        It inherits the fields `_INHERITED` of `parent` and, if `rows` holds that row alone, its response.
        """
        ids = tuple(dict.fromkeys(row.id for row in rows))
        digest = hashlib.sha256(json.dumps([self.seed, number, image_text, prompt, ids]).encode()).hexdigest()[:24]
        answered = parent if len(rows) == 1 else None
        inherited = {name: parent.meta[name] for name in _INHERITED if name in parent.meta} if parent else {}
        if not answered and inherited.get("category_of") == "response":
            inherited = {}
        sample = Sample(
            id=never_held_out(f"{SOURCE}/{digest}"),
            source=SOURCE,
            modality="text-image" if prompt else "image",
            prompt=prompt,
            images=(str(self.folder / f"{digest}.png"),),
            response=answered.response if answered else None,
            request_label=union_label(rows, "request"),
            response_label=answered.response_label if answered else None,
            meta={**inherited, **Provenance(image_text=image_text, of=ids).as_meta()},
        )
        return Rendering(sample, digest)
