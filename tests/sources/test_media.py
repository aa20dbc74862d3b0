"""No picture, video or sound that a row names is lost unseen: it is read, or the row is skipped with the reason."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from guardreasoner_vl.batch.rows import RejectedLine, read_batch_rows
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.evaluation.benchmarks.base import load
from guardreasoner_vl.evaluation.benchmarks.catalogue import benchmark_named
from guardreasoner_vl.guard import as_exchange
from guardreasoner_vl.sources import parquet
from guardreasoner_vl.sources.adapters import read_source
from guardreasoner_vl.sources.catalogue import adapter_named
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.sources.skipped import SkippedRows
from tests.builders import answer, write_records

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.types import Sample

ANSWER = answer("harmful", reasoning="x")
VALUES = [
    {"video": "a.mp4"},
    {"videos": ["a.mp4"]},
    {"audio": "a.wav"},
    {"audios": ["a.wav"]},
    {"audio_path": "a.wav"},
    {"imageUrl": "http://example.org/a.png"},
    {"picture": "a.png"},
    {"img_path": "a.png"},
    {"attachments": [{"name": "a.png"}]},
]
"""Media under keys that no reader reads."""


def asked(prompt: str) -> str:
    return f"Human user:\n{prompt}\n\nAI assistant:\nNone\n"


def sharegpt(prompt: str, **more: Any) -> dict[str, Any]:
    return {
        "conversations": [{"from": "human", "value": asked(prompt)}, {"from": "gpt", "value": ANSWER}],
        **more,
    }


def messages(prompt: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": asked(prompt)}, {"role": "assistant", "content": ANSWER}],
        **more,
    }


def flat(prompt: str, **more: Any) -> dict[str, Any]:
    return {"instruction": "judge", "input": asked(prompt), "output": "harmful", **more}


def train(prompt: str, **more: Any) -> dict[str, Any]:
    return {"input": asked(prompt), "output": "Step.\nAnswers:\nRequest: harmful\nResponse: None", **more}


def wild(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "prompt_harm_label": "harmful", "response_harm_label": None, **more}


def own(prompt: str, **more: Any) -> dict[str, Any]:
    fields = {"id": "a", "source": "s", "modality": "text", "prompt": prompt, "request_label": "harmful"}
    return {**fields, **more}


Read = tuple[list["Sample"], list[str]]


def read(layout: str, row: dict[str, Any], folder: Path) -> Read:
    """The samples of a file with this row alone, and why rows were skipped."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    skipped = SkippedRows()
    if layout == "samples":
        samples = list(read_samples(write_records(folder, "train.jsonl", [row]), skipped))
    elif layout == "released test":
        write_records(folder, "test/ToxicChat.json", [row, flat("hi")])
        loaded = load(benchmark_named("ToxicChat"), folder, folder / "x")
        samples, skipped = [sample for sample in loaded.samples if sample.prompt != "hi"], loaded.skipped
    else:
        file = {"guardreasonertrain": "A-Train-R.json", "wildguardtrain": "train/wildguard_train.parquet"}
        write_records(folder, file.get(layout, "train.json"), [row])
        samples = list(read_source(adapter_named(layout), folder, folder / "x", skipped))
    assert all(place and reason in skipped.reasons for place, reason in skipped.rows)
    return samples, list(skipped.reasons)


LAYOUTS: dict[str, Any] = {
    "samples": own,
    "sharegpt": sharegpt,
    "guardreasoner-vltrain": messages,
    "guardreasonertrain": train,
    "wildguardtrain": wild,
    "released test": flat,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("more", VALUES)
def test_a_medium_that_is_not_read_sets_the_row_aside(layout: str, more: dict[str, Any], tmp_path: Path) -> None:
    samples, reasons = read(layout, LAYOUTS[layout]("what is this", **more), tmp_path)
    assert not samples
    (reason,) = reasons
    assert next(iter(more)) in reason
    assert "a.png" not in reason


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", ["image", "video", "images"])
def test_an_empty_medium_is_none(layout: str, key: str, tmp_path: Path) -> None:
    if layout == "samples" and key != "images":
        return  # a sample has no field of that name, empty or not
    samples, reasons = read(layout, LAYOUTS[layout]("what is this", **{key: None}), tmp_path)
    assert not reasons
    assert [sample.modality for sample in samples] == ["text"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mark", ["<video>", "<audio>", "<image>", "<image>\n<image>", "<Video>"])
def test_a_mark_without_its_medium_sets_the_row_aside(layout: str, mark: str, tmp_path: Path) -> None:
    samples, reasons = read(layout, LAYOUTS[layout](f"{mark}\nwhat is this"), tmp_path)
    assert not samples
    (reason,) = reasons
    assert "mark" in reason


CONVERSATIONS = ("sharegpt", "guardreasoner-vltrain")


@pytest.mark.parametrize("layout", [*CONVERSATIONS, "guardreasonertrain"])
@pytest.mark.parametrize("key", ["image", "images", "image_path", "image_paths"])
@pytest.mark.parametrize("value", ["a.png", ["a.png"]])
def test_an_image_under_any_of_its_usual_keys_is_read(layout: str, key: str, value: Any, tmp_path: Path) -> None:
    (sample,), reasons = read(layout, LAYOUTS[layout]("<image>\nwhat is this", **{key: value}), tmp_path)
    assert not reasons
    assert (sample.prompt, sample.images, sample.modality) == (
        "what is this",
        (str(tmp_path / "a.png"),),
        "text-image",
    )


@pytest.mark.parametrize("layout", [*CONVERSATIONS, "guardreasonertrain"])
@pytest.mark.parametrize(
    ("prompt", "more"),
    [
        ("what is this", {"image": "a.png"}),
        ("<image>\n<image>\nwhat is this", {"image": "a.png"}),
        ("<image>\nwhat is this", {"images": ["a.png", "a.png"]}),
        ("<image>\nwhat is this", {"image": "a.png", "images": ["b.png"]}),
        ("<image>\nwhat is this <image>", {"images": ["a.png"]}),
        ("what is this <image>", {"images": ["a.png"]}),
        ("<image>\nwhat is this", {"image": "a.png", "video": "b.mp4"}),
        ("<image>\n<video>\nwhat is this", {"image": "a.png"}),
        ("<image>\nwhat is this", {"image": "missing.png"}),
        ("<image>\nwhat is this", {"image": 5}),
        ("<image>\nwhat is this", {"image": "http://example.org/a.png"}),
    ],
)
def test_marks_and_images_that_disagree(layout: str, prompt: str, more: dict[str, Any], tmp_path: Path) -> None:
    samples, reasons = read(layout, LAYOUTS[layout](prompt, **more), tmp_path)
    assert not samples
    assert len(reasons) == 1


def test_a_released_test_row_keeps_its_image(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "a.png")
    rows = [flat("<image>", image="a.png"), flat("<image>"), flat("what is this", image="a.png")]
    write_records(tmp_path, "test/HarmImageTest.json", rows)
    loaded = load(benchmark_named("HarmImageTest"), tmp_path, tmp_path / "x")
    assert [(sample.images, sample.prompt) for sample in loaded.samples] == [((str(tmp_path / "test" / "a.png"),), "")]
    assert loaded.skipped.total == 2


@pytest.mark.parametrize("layout", CONVERSATIONS)
def test_what_a_message_carries_is_seen(layout: str, tmp_path: Path) -> None:
    row = LAYOUTS[layout]("what is this")
    (key,) = row
    for more in ({"images": ["a.png"]}, {"video": "a.mp4"}):
        spoken = [{**row[key][0], **more}, row[key][1]]
        samples, reasons = read(layout, {key: spoken}, tmp_path)
        assert not samples
        assert next(iter(more)) in reasons[0]
    parts = [{"type": "text", "text": "hi"}, {"type": "image", "image": "a.png"}]
    field = "value" if layout == "sharegpt" else "content"
    samples, reasons = read(layout, {key: [{**row[key][0], field: parts}, row[key][1]]}, tmp_path)
    assert (samples, reasons) == ([], [f"no text in {field!r}"])


@pytest.mark.parametrize(("modality", "images"), [("image", []), ("text-image", None)])
def test_a_modality_with_an_image_has_one(modality: str, images: list[str] | None, tmp_path: Path) -> None:
    samples, reasons = read("samples", own("what", modality=modality, images=images), tmp_path)
    assert not samples
    assert reasons == [f"modality: '{modality}', but there is no image"]


@pytest.mark.parametrize("path", [{"bytes": None, "path": None}, {"bytes": b"", "path": ""}])
def test_a_parquet_image_without_bytes_and_path(path: dict[str, Any], tmp_path: Path) -> None:
    write_records(tmp_path, "rows.parquet", [own("what", modality="text-image", images=[path])])
    skipped = SkippedRows()
    assert not list(parquet.read_parquet(tmp_path / "rows.parquet", skipped))
    assert skipped.rows == [("rows.parquet, row 1", "images: neither an image's bytes nor its path")]


@pytest.mark.parametrize("more", [*VALUES, {"image": "a.png"}, {"image_path": "a.png"}])
def test_what_is_judged_names_no_other_media(more: dict[str, Any], tmp_path: Path) -> None:
    """Rows of a batch, items of the Guard API, and chat messages."""
    key = next(iter(more))
    (row,) = read_batch_rows([json.dumps({"id": 1, "prompt": "x", **more}).encode()], tmp_path)
    assert isinstance(row, RejectedLine)
    assert key in row.reason
    with pytest.raises(InputError, match=key):
        as_exchange({"prompt": "x", **more})
    with pytest.raises(InputError, match=key):
        as_exchange({"messages": [{"role": "user", "content": "x", **more}]})
    with pytest.raises(InputError, match=key):
        as_exchange({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", **more}]}]})


def test_fields_that_describe_media_are_none(tmp_path: Path) -> None:
    row = {"id": 1, "prompt": "x", "image_description": "a cat", "num_images": 3, "video_title": "cats", "images": []}
    (row_read,) = read_batch_rows([json.dumps(row).encode()], tmp_path)
    assert not isinstance(row_read, RejectedLine)
