"""Folders of JSON lines become samples; broken rows are counted or named."""

from __future__ import annotations

import gzip
import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.sources.jsonl import find_split, is_held_out, read_samples
from guardreasoner_vl.sources.skipped import SkippedRows

if TYPE_CHECKING:
    from pathlib import Path

ROW = {"id": "a", "source": "s", "modality": "text", "prompt": "hi", "request_label": "unharmful"}


def test_gz_and_plain_give_the_same_rows(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "id": "ü", "prompt": "привет\u2028x", "response": "yes", "response_label": "harmful"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / "train.jsonl").write_text(text, "utf-8")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    plain = list(read_samples(tmp_path / "train.jsonl"))
    assert plain == list(read_samples(tmp_path / "train.jsonl.gz"))
    assert [(row.id, row.prompt, row.response_label) for row in plain] == [
        ("a", "hi", None),
        ("ü", "привет\u2028x", "harmful"),
    ]


def test_the_real_layout_is_read(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "id": "i",
        "source": "s",
        "split": "train",
        "modality": "image",
        "prompt": None,
        "images": ["images/1.jpg", "2.png"],
        "response": None,
        "request_label": "harmful",
        "response_label": None,
        "meta": {"weak": True},
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    (sample,) = read_samples(tmp_path / "train.jsonl")
    assert sample.prompt == ""
    assert sample.images == (str(tmp_path / "images/1.jpg"), str(tmp_path / "2.png"))
    assert sample.meta == {"weak": True}
    (tmp_path / "train.jsonl").write_text(json.dumps({**row, "modality": "text", "prompt": "hi", "images": None}))
    assert next(iter(read_samples(tmp_path / "train.jsonl"))).images == ()


# sha256 of the id, as a number, modulo 20: worked out with `sha256sum` and `bc`, not with the function.
@pytest.mark.parametrize(
    ("sample_id", "held_out"),
    [("row-2", False), ("row-14", True), ("row-118", True), ("", False), ("ü", False)],
)
def test_held_out_split(sample_id: str, held_out: bool) -> None:
    assert is_held_out(sample_id) is held_out


def test_about_a_twentieth_is_held_out() -> None:
    assert 400 < sum(is_held_out(str(number)) for number in range(10_000)) < 600


NO_LIST = "images: not a list of paths"
BROKEN = [
    ("not json", "not JSON"),
    ("[1, 2]", "not an object"),
    ("3", "not an object"),
    ("null", "not an object"),
    ('"text"', "not an object"),
    (json.dumps({**ROW, "request_label": "safe"}), "request_label: input should be 'harmful' or 'unharmful'"),
    (json.dumps({**ROW, "unknown": 1}), "unknown: not a field of a sample"),
    (
        json.dumps({**ROW, "meta": {"category_of": "image"}}),
        "meta.category_of: input should be 'request' or 'response'",
    ),
    (json.dumps({**ROW, "id": 5}), "id: input should be a valid string"),
    (json.dumps({**ROW, "images": "one.png"}), NO_LIST),
    (json.dumps({**ROW, "images": 5}), NO_LIST),
    (json.dumps({**ROW, "images": [None]}), NO_LIST),
    (json.dumps({**ROW, "images": {"a": 1}}), NO_LIST),
    (json.dumps({**ROW, "prompt": ["hi"]}), "prompt: input should be a valid string"),
    (json.dumps({key: value for key, value in ROW.items() if key != "id"}), "id: field required"),
    ("[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_row_is_named_or_counted(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{line}\n{json.dumps({**ROW, 'id': 'b'})}\n")
    with pytest.raises(DataError, match=rf"train\.jsonl, line 3: {re.escape(reason)}; fix or remove it"):
        list(read_samples(path))
    skipped = SkippedRows()
    assert [row.id for row in read_samples(path, skipped)] == ["a", "b"]
    assert skipped.rows == [("train.jsonl, line 3", reason)]
    assert skipped.total == 1


def test_a_row_that_is_no_utf8_is_named_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"id": "\xff"}\n' + json.dumps(ROW).encode() + b"\n")
    with pytest.raises(DataError, match="line 1"):
        list(read_samples(path))
    skipped = SkippedRows()
    assert [row.id for row in read_samples(path, skipped)] == ["a"]
    assert skipped.total == 1


@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_cut_off_download_is_an_error_even_where_rows_are_counted(tmp_path: Path, kept: float) -> None:
    lines = b"".join(json.dumps({**ROW, "id": str(number)}).encode() + b"\n" for number in range(2000))
    packed = gzip.compress(lines)
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(packed[: int(len(packed) * kept)])
    with pytest.raises(DataError, match="cannot be read to its end"):
        list(read_samples(path, SkippedRows()))


def test_what_is_no_gzip_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match="cannot be read to its end"):
        list(read_samples(path))


def test_find_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train\.jsonl or train\.jsonl\.gz; give a folder that holds one"):
        find_split(tmp_path, "train")
    (tmp_path / "train.jsonl").touch()
    assert find_split(tmp_path, "train").name == "train.jsonl"
    (tmp_path / "train.jsonl.gz").touch()
    assert find_split(tmp_path, "train").name == "train.jsonl.gz"


def test_counts_add_up() -> None:
    first, second = SkippedRows({"a": 1, "b": 2}), SkippedRows({"b": 3, "c": 4})
    first.merge(second)
    assert first.reasons == {"a": 1, "b": 5, "c": 4}
    assert second.reasons == {"b": 3, "c": 4}
