"""Adapters of images: made-up, mild records in the official layouts, every trap of the real ones."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.sources.adapters import RecordContext, image_of
from tests.builders import labels, write_image, write_records
from tests.sources.test_adapters import read

if TYPE_CHECKING:
    from pathlib import Path


def shown(colour: str = "red") -> dict[str, Any]:
    """An image as the hub's image columns hold it."""
    buffer = BytesIO()
    Image.new("RGB", (28, 28), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "cake.png"}


def test_unsafebench_has_images_alone(tmp_path: Path) -> None:
    first = {"image": shown(), "safety_label": "Safe", "category": "Hate", "source": "Lexica", "text": "a cake"}
    write_records(tmp_path, "data/train-00000-of-00002.parquet", [first, {**first, "safety_label": "unsafe"}])
    write_records(
        tmp_path, "data/train-00001-of-00002.parquet", [{**first, "safety_label": "Unsafe"}, {**first, "image": None}]
    )
    write_records(tmp_path, "data/test-00000-of-00001.parquet", [first])
    samples, skipped = read("unsafebench", tmp_path)
    assert [(one.id, one.request_label) for one in samples] == [
        ("unsafebench/0", "unharmful"), ("unsafebench/2", "harmful"),
    ]  # fmt: skip
    assert all(one.modality == "image" and not one.prompt and one.meta == {"category": "Hate"} for one in samples)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert samples[0].images == samples[1].images == (str(unpacked),)
    assert skipped.reasons == {"'safety_label' is none of 'Safe', 'Unsafe'": 1, "no image in it": 1}


def guarded(name: str, safe: object, *instructions: dict[str, Any], **more: str) -> dict[str, Any]:
    return {"id": "same", "image": name, "safe": safe, "instr-resp": list(instructions), **more}


VLGUARD = [
    guarded("memes/1.png", True, {"safe_instruction": "s", "response": "t"}, {"unsafe_instruction": "u"}),
    guarded(
        "bad_ads/2.png",
        False,
        {"instruction": "i", "response": "no"},
        harmful_category="c",
        harmful_subcategory="d",
    ),
    guarded("alone.png", "no", {"instruction": "i"}),
    guarded("memes/1.png", False),
    guarded("memes/1.png", False, {"request": "i"}),
    guarded("memes/1.png", False, {"instruction": " "}),
    guarded("memes/3.png", False, {"instruction": "i"}),
]


def test_vlguard_has_a_row_for_each_instruction(tmp_path: Path) -> None:
    write_records(tmp_path, "train.json", VLGUARD)
    for name in ("train/memes/1.png", "bad_ads/2.png", "alone.png"):
        write_image(tmp_path, name)
    samples, skipped = read("vlguard", tmp_path)
    assert [(one.id, one.prompt, one.response, one.request_label, one.response_label) for one in samples] == [
        ("vlguard/0/safe_instruction", "s", "t", "unharmful", None),
        ("vlguard/0/unsafe_instruction", "u", None, "harmful", None),
        ("vlguard/1/instruction", "i", "no", "harmful", None),
    ]
    assert samples[0].images == (str(tmp_path / "train/memes/1.png"),)
    assert [one.meta for one in samples[1:]] == [
        {"subset": "memes"},
        {"category": "c", "subcategory": "d", "subset": "bad_ads"},
    ]
    assert {one.modality for one in samples} == {"text-image"}
    assert skipped.reasons == {
        "no safety flag or no instruction": 3,
        "no text in 'instruction'": 1,
        "its image is missing": 1,
    }


def test_vlguard_images_are_labelled_by_themselves(tmp_path: Path) -> None:
    write_records(tmp_path, "train.json", VLGUARD[:3])
    for name in ("train/memes/1.png", "train/bad_ads/2.png", "train/alone.png"):
        write_image(tmp_path, name)
    samples, skipped = read("vlguard-images", tmp_path)
    assert [(one.modality, one.prompt, one.request_label, one.meta.get("subset")) for one in samples] == [
        ("image", "", "unharmful", "memes"), ("image", "", "harmful", "bad_ads"),
    ]  # fmt: skip
    assert skipped.reasons == {"'safe' is none of True, False": 1}


def test_hod_is_every_image_below_a_class(tmp_path: Path) -> None:
    names = ["bread/normal/a.jpg", "bread/hard/b.PNG", "cake/c.jpeg", "cake/deep/er/a.webp", "bread/normal/A.JPG"]
    for name in ["stray.jpg", *names]:
        write_image(tmp_path, name)
    for name in ("bread/normal/a.xml", "bread/normal/a.txt", "cake/._c.jpeg", "cake/notes.pg", "HOD.csv"):
        (tmp_path / name).write_text("no image")
    samples, skipped = read("hod", tmp_path)
    assert {one.id: one.meta["category"] for one in samples} == {f"hod/{name}": name.split("/")[0] for name in names}
    assert all((one.modality, one.prompt, one.request_label) == ("image", "", "harmful") for one in samples)
    assert {one.images[0] for one in samples} == {str(tmp_path / name) for name in names}
    assert not skipped.total


@pytest.mark.parametrize("above", ["dataset/class/", "class/", "Dataset/"])
def test_hod_as_its_repository_has_it(above: str, tmp_path: Path) -> None:
    write_image(tmp_path, f"{above}gun/hard_cases/img_hod_000001.jpg")
    if "class" in above:  # the same image once more, and a figure of the page that describes the set
        write_image(tmp_path, f"{above.removesuffix('class/')}all/jpg/img_hod_000001.jpg")
        write_image(tmp_path, "resources/examples.png")
    (sample,), _ = read("hod", tmp_path)
    assert (sample.id, sample.meta) == (f"hod/{above}gun/hard_cases/img_hod_000001.jpg", {"category": "gun"})


def test_spa_vl_has_two_unlabelled_rows_for_a_pair(tmp_path: Path) -> None:
    pair = {"image": shown(), "question": "q", "chosen": "c", "rejected": "r"}
    pair |= {"class1": "Toxicity Harms", "class2": "x", "class3": "y"}
    rows = [pair, {**pair, "chosen": None}, {**pair, "question": ""}, {**pair, "image": {"bytes": b"", "path": "a"}}]
    write_records(tmp_path, "data/train-00000-of-00008.parquet", rows)
    write_records(tmp_path, "data/validation-00000-of-00001.parquet", rows)
    samples, skipped = read("spa-vl", tmp_path)
    assert [(one.id, one.prompt, one.response, one.modality) for one in samples] == [
        ("spa-vl/0-chosen", "q", "c", "text-image"),
        ("spa-vl/0-rejected", "q", "r", "text-image"),
    ]
    assert labels(samples) == [(None, None)] * 2
    assert samples[1].meta == {"category": "Toxicity Harms", "class2": "x", "class3": "y", "answer": "rejected"}
    assert skipped.reasons == {"no text in 'chosen'": 1, "no text in 'question'": 1, "no image in it": 1}


@pytest.mark.parametrize("name", ["a" * 300, "/", "a\0b", ".", "cake.gif"])
def test_a_name_that_is_no_image_is_a_missing_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its image is missing"):
        image_of(RecordContext("x", 0, tmp_path, tmp_path), name)
