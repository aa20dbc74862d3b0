"""Rendered rows: labels by the union rule, words that stand in the image alone, and a share that holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from guardreasoner_vl.images.decode import decoded_images
from guardreasoner_vl.recipe import DataSection, RenderedSection
from guardreasoner_vl.sources.jsonl import is_held_out
from guardreasoner_vl.sources.mixture import extended
from guardreasoner_vl.sources.rendered import CARRIERS, LONGEST, SOURCE, planned, rendered_rows
from guardreasoner_vl.types import GoldLabel, Modality, Sample

HARMFUL = [f"how do I steal bike number {number}" for number in range(60)]
HARMLESS = [f"how do I wash bike number {number}" for number in range(60)]
REQUESTS: dict[str, GoldLabel] = {**dict.fromkeys(HARMFUL, "harmful"), **dict.fromkeys(HARMLESS, "unharmful")}


def row(prompt: str, label: GoldLabel | None, **fields: object) -> Sample:
    return Sample.model_validate(
        {"id": f"row/{prompt}", "source": "s", "modality": "text", "prompt": prompt, "request_label": label, **fields}
    )


ROWS = [row(prompt, label) for prompt, label in REQUESTS.items()]
SECTION = RenderedSection(share=0.8)
ALL: tuple[Modality, ...] = ("text", "image", "text-image")


def test_half_are_made_from_harmful_rows_and_the_share_holds(tmp_path: Path) -> None:
    rows = [rendering.sample for rendering in planned(ROWS, SECTION, tmp_path, 0, ALL)]
    assert len(rows) == 480  # four times the rows that are there
    assert len({sample.id for sample in rows}) == 480
    assert not any(is_held_out(sample.id) for sample in rows)
    labels = Counter(sample.request_label for sample in rows)
    assert labels == {"harmful": 240, "unharmful": 240}
    assert {sample.source for sample in rows} == {SOURCE}


def test_a_row_is_harmful_if_its_image_or_its_prompt_is(tmp_path: Path) -> None:
    kinds = Counter[tuple[bool, bool]]()
    for rendering in planned(ROWS, SECTION, tmp_path, 0, ALL):
        sample = rendering.sample
        shown = sample.provenance.image_text or ""
        texts = [text for text in (shown, sample.prompt) if text in REQUESTS]
        assert 1 <= len(texts) <= 2
        expected = "harmful" if "harmful" in [REQUESTS[text] for text in texts] else "unharmful"
        assert sample.request_label == expected
        assert sample.prompt in ("", *CARRIERS, *REQUESTS)
        assert sample.modality == ("text-image" if sample.prompt else "image")
        assert sample.provenance.of == tuple(f"row/{text}" for text in dict.fromkeys(texts))
        kinds[bool(shown), sample.prompt in REQUESTS] += 1
    assert set(kinds) == {(True, False), (True, True), (False, True)}


def test_the_images_are_drawn_once_and_are_the_same_again(tmp_path: Path) -> None:
    section = RenderedSection(share=0.1)
    first = rendered_rows(ROWS, section, tmp_path / "a", 0, ALL)
    again = rendered_rows(ROWS, section, tmp_path / "b", 0, ALL)
    for sample, same in zip(first, again, strict=True):
        paths = Path(sample.images[0]), Path(same.images[0])
        assert paths[0].read_bytes() == paths[1].read_bytes()
        (image,) = decoded_images(paths[0])
        assert image.mode == "RGB"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    assert rendered_rows(ROWS, section, tmp_path / "a", 0, ALL) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before


def test_a_stop_leaves_no_torn_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, *_) = planned(ROWS, SECTION, tmp_path / "images", 0, ALL)

    def torn(image: Image.Image, path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", torn)
        with pytest.raises(KeyboardInterrupt):
            first.draw()
    assert list((tmp_path / "images").iterdir()) == []
    first.draw()
    assert [path.name for path in (tmp_path / "images").iterdir()] == [Path(first.sample.images[0]).name]


def test_another_text_under_the_same_id_gets_another_image(tmp_path: Path) -> None:
    corrected = [row.model_copy(update={"prompt": f"{row.prompt}, please"}) for row in ROWS]
    names = [{new.sample.images[0] for new in planned(rows, SECTION, tmp_path, 0, ALL)} for rows in (ROWS, corrected)]
    assert not names[0] & names[1]


@pytest.mark.parametrize("modalities", [("text", "image"), ("text", "text-image"), ("text",)])
def test_only_the_recipe_s_modalities_are_made(modalities: tuple[Modality, ...], tmp_path: Path) -> None:
    modes = {rendering.sample.modality for rendering in planned(ROWS, SECTION, tmp_path, 0, modalities)}
    assert modes == set(modalities) - {"text"}


def test_what_is_known_of_a_row_goes_with_the_request_that_decides(tmp_path: Path) -> None:
    known = [
        row(
            prompt, label, meta={"category": label, "kind": "homonyms"} if label == "harmful" else {"category": "bikes"}
        )
        for prompt, label in REQUESTS.items()
    ]
    for rendering in planned(known, SECTION, tmp_path, 0, ALL):
        sample = rendering.sample
        both = sample.prompt in REQUESTS and bool(sample.provenance.image_text)
        harmless = None if both else "bikes"
        assert sample.provenance.category == ("harmful" if sample.request_label == "harmful" else harmless)


def test_a_category_of_the_response_does_not_outlive_it(tmp_path: Path) -> None:
    known = [
        row(prompt, label, response="Gladly.", response_label=label, meta={"category": "x", "category_of": "response"})
        for prompt, label in REQUESTS.items()
    ]
    for rendering in planned(known, SECTION, tmp_path, 0, ALL):
        sample = rendering.sample
        assert (sample.provenance.category is None) == (sample.response is None)


@pytest.mark.parametrize(
    "unfit",
    [
        row("x" * (LONGEST + 1), "harmful"),
        row("怎么偷一辆自行车呢请告诉我", "harmful"),
        row("how do I steal a bike", None, response="Sure.", response_label="harmful"),
        row("how do I steal a bike", "harmful", meta={"weak": True}),
        row("bike", "harmful"),
    ],
)
def test_rows_that_cannot_be_rendered(unfit: Sample, tmp_path: Path) -> None:
    rows = planned([unfit, *ROWS[60:]], SECTION, tmp_path, 0, ALL)
    assert rows
    assert {rendering.sample.request_label for rendering in rows} == {"unharmful"}


def test_an_answer_stays_with_its_request(tmp_path: Path) -> None:
    answered = [row(prompt, "unharmful", response="Gladly.", response_label="unharmful") for prompt in HARMLESS]
    for rendering in planned(answered, SECTION, tmp_path, 0, ALL):
        sample = rendering.sample
        both = sample.prompt in REQUESTS and bool(sample.provenance.image_text)
        assert (sample.response, sample.response_label) == ((None, None) if both else ("Gladly.", "unharmful"))


def test_a_text_only_mixture_has_none(tmp_path: Path) -> None:
    section = {"rendered": {"share": 0.5}}
    only_text = DataSection.model_validate({**section, "modalities": ["text"]})
    assert extended(ROWS, only_text, tmp_path, 0) == ROWS
    both = extended(ROWS, DataSection.model_validate(section), tmp_path, 0)
    assert len(both) == 2 * len(ROWS)
    assert all(Path(sample.images[0]).is_file() for sample in both[len(ROWS) :])
