"""Adapters of labelled texts: made-up, mild records in the official layouts, every trap of the real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.errors import DataError, InputError
from guardreasoner_vl.sources.adapters import read_source
from guardreasoner_vl.sources.catalogue import ADAPTERS, adapter_named
from guardreasoner_vl.sources.skipped import SkippedRows
from tests.builders import labels, write_records

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.types import Sample


def read(name: str, folder: Path) -> tuple[list[Sample], SkippedRows]:
    skipped = SkippedRows()
    samples = list(read_source(adapter_named(name), folder, folder / "unpacked", skipped))
    assert all(sample.split == "train" and sample.source == name for sample in samples)
    assert len({sample.id for sample in samples}) == len(samples)
    return samples, skipped


# --- the catalogue --------------------------------------------------------------------------------------


def test_every_adapter_is_found_under_its_name() -> None:
    expected = (
        "wildguardtrain aegis beavertails beavertails-30k toxicchat unsafebench vlguard vlguard-images hod spa-vl"
    )
    assert list(ADAPTERS) == [*expected.split(), "guardreasoner-vltrain", "guardreasonertrain", "sharegpt"]
    assert all(name == adapter.name and adapter.licence for name, adapter in ADAPTERS.items())
    assert {name for name, adapter in ADAPTERS.items() if adapter.gated} == {
        "wildguardtrain", "unsafebench", "vlguard", "vlguard-images",
    }  # fmt: skip
    assert adapter_named("SPA-VL").name == "spa-vl"
    with pytest.raises(InputError, match=r"no data set named 'spavl'; use wildguardtrain, .*sharegpt"):
        adapter_named("spavl")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_missing_set_says_where_to_get_it(name: str, tmp_path: Path) -> None:
    adapter = ADAPTERS[name]
    with pytest.raises(DataError) as raised:
        read(name, tmp_path)
    text = str(raised.value)
    assert adapter.files[0] in text
    assert adapter.origin in text
    assert ("accepting its terms" in text) == adapter.gated


# --- texts ----------------------------------------------------------------------------------------------


def wild(prompt: str, response: str | None, request: str | None, answered: str | None) -> dict[str, Any]:
    record = {"prompt": prompt, "adversarial": False, "response": response, "subcategory": "baking"}
    return {**record, "prompt_harm_label": request, "response_harm_label": answered}


def test_wildguard_has_one_row_with_both_labels(tmp_path: Path) -> None:
    rows = [
        wild("a", "b", "harmful", "unharmful"),
        wild("c", None, "unharmful", None),
        wild("d", "e", "harmful", None),
        wild("f", "g", None, "harmful"),
        wild("h", "i", None, None),
        wild("j", None, "harmful", "unharmful"),
        wild("k", " ", None, "harmful"),
        wild("l", "m", "Harmful", None),
        wild(" ", "n", "harmful", None),
        wild("o", "", "harmful", None),
    ]
    write_records(tmp_path, "train/wildguard_train.parquet", rows)
    samples, skipped = read("wildguardtrain", tmp_path)
    assert [(one.prompt, one.response) for one in samples] == [
        ("a", "b"), ("c", None), ("d", "e"), ("f", "g"), ("o", None),
    ]  # fmt: skip
    assert labels(samples) == [
        ("harmful", "unharmful"), ("unharmful", None), ("harmful", None), (None, "harmful"), ("harmful", None),
    ]  # fmt: skip
    assert samples[3].id == "wildguardtrain/3"
    assert samples[0].meta == {"category": "baking", "adversarial": False}
    assert skipped.reasons == {
        "no label": 1,
        "no text in 'response'": 2,
        "'prompt_harm_label' is none of 'harmful', 'unharmful'": 1,
        "no text in 'prompt'": 1,
    }
    assert skipped.rows[0] == ("wildguard_train.parquet, row 5", "no label")


@pytest.mark.parametrize("kept", [0, 3, 40, -1, -60])
def test_a_torn_parquet_file_is_one_error(kept: int, tmp_path: Path) -> None:
    path = write_records(tmp_path, "train/wildguard_train.parquet", [wild("a", "b", "harmful", None)])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="cannot be read to its end"):
        read("wildguardtrain", tmp_path)


def votes(*words: str | None, text: str = " a ", kind: str = "user_message") -> dict[str, Any]:
    padded = [*words, *[None] * (5 - len(words))]
    counted = {"text": text, "text_type": kind, "num_annotations": len(words)}
    return counted | {f"labels_{number}": vote for number, vote in enumerate(padded)}


def test_aegis_takes_the_majority_of_all_votes(tmp_path: Path) -> None:
    rows = [
        votes("Safe", "Safe", "Violence, Hate"),
        votes("Safe", "Needs Caution", "Hate, Violence", "Hate", "Safe"),
        votes("Safe", "Safe", "Hate", "Hate"),
        votes("Safe", "", None, "Safe"),
        votes("safe", "Safe", "Safely"),
        votes("Safe", "Safe", "Safe", kind="llm_response"),
        votes("Safe", "Safe", "Safe", text=" "),
        votes(None, "Safe", None, "Safe", "Safe"),
    ]
    write_records(tmp_path, "Content Moderation Extracted Annotations 02.08.24_train_release_0418_v1.parquet", rows)
    write_records(tmp_path, "Content Moderation Extracted Annotations 02.08.24_test_release_0418_v1.parquet", rows)
    samples, skipped = read("aegis", tmp_path)
    assert labels(samples) == [("unharmful", None), ("harmful", None), ("harmful", None), ("unharmful", None)]
    assert [one.meta for one in samples] == [{"category": kind} for kind in ("Violence", "Hate", "safe")] + [{}]
    assert samples[0].prompt == "a"
    assert skipped.reasons == {"no majority": 1, "fewer than three annotations": 1, "no text in 'text'": 1}


def test_aegis_is_also_read_as_the_hub_converts_it(tmp_path: Path) -> None:
    write_records(tmp_path, "data/train-00000-of-00001.parquet", [votes("Safe", "Safe", "Safe")])
    assert labels(read("aegis", tmp_path)[0]) == [("unharmful", None)]


def beaver(response: str | None, safe: object, **marked: bool) -> dict[str, Any]:
    return {"prompt": "a", "response": response, "category": marked, "is_safe": safe}


def test_beavertails_labels_the_response_only(tmp_path: Path) -> None:
    rows = [
        beaver("b", False, hate=False, theft=True, fraud=True),
        beaver("c", True, hate=False),
        beaver("c", True, hate=False),  # published twice; curation tells
        beaver("d", None),
        beaver("e", "false"),
        beaver(None, True),
    ]
    write_records(tmp_path, "round0/330k/train.jsonl.xz", rows)
    write_records(tmp_path, "round0/30k/train.jsonl.gz", rows[:1])
    samples, skipped = read("beavertails", tmp_path)
    assert labels(samples) == [(None, "harmful"), (None, "unharmful"), (None, "unharmful")]
    assert [one.meta for one in samples] == [{"category": "theft"}, {}, {}]
    assert skipped.reasons == {
        "'is_safe' is none of True, False": 2,
        "no text in 'response'": 1,
    }
    assert len(read("beavertails-30k", tmp_path)[0]) == 1


@pytest.mark.parametrize(
    "file", ["round0/330k/train.jsonl.gz", "round0/30k/train.jsonl.gz", "data/330k_train-00000-of-00001.parquet"]
)
def test_beavertails_in_its_other_layouts(file: str, tmp_path: Path) -> None:
    write_records(tmp_path, file, [beaver("b", False, theft=True)])
    assert labels(read("beavertails", tmp_path)[0]) == [(None, "harmful")]


def test_toxic_chat_keeps_all_rows_and_who_annotated_them(tmp_path: Path) -> None:
    cells = [
        ("a", "True", "1"),
        ("b", "False", "0"),
        ("c", "True", "yes"),
        ("", "True", "0"),
        ("one\ntwo", "True", "0"),
    ]
    rows = [
        {"conv_id": "1", "user_input": text, "model_output": "x", "human_annotation": by, "toxicity": toxicity}
        for text, by, toxicity in cells
    ]
    write_records(tmp_path, "data/0124/toxic-chat_annotation_train.csv", rows)
    samples, skipped = read("toxicchat", tmp_path)
    assert [(one.prompt, one.response, one.request_label) for one in samples] == [
        ("a", None, "harmful"), ("b", None, "unharmful"), ("one\ntwo", None, "unharmful"),
    ]  # fmt: skip
    assert [one.meta["human_annotation"] for one in samples] == ["True", "False", "True"]
    assert skipped.reasons == {"'toxicity' is none of '1', 1, '0', 0": 1, "no text in 'user_input'": 1}


def test_text_that_no_tokenizer_takes_is_skipped(tmp_path: Path) -> None:
    write_records(tmp_path, "round0/30k/train.jsonl.gz", [beaver("\ud800", True), beaver("b", True)])
    samples, skipped = read("beavertails", tmp_path)
    assert [one.response for one in samples] == ["b"]
    assert skipped.rows == [("train.jsonl.gz, line 1", "response: not UTF-8")]
