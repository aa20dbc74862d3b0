"""One bad row in the middle of any file that is read: it is named with its reason, and the rest is read.

Every reader against every kind of badness; the reason never shows what stands in the row.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow
import pytest
from pyarrow import parquet

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.benchmarks.base import load
from guardreasoner_vl.evaluation.benchmarks.catalogue import benchmark_named
from guardreasoner_vl.evaluation.external_predictions import read_external_predictions
from guardreasoner_vl.sources.adapters import read_source
from guardreasoner_vl.sources.catalogue import adapter_named
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.sources.parquet import read_parquet
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.storage.jsonl_log import MAX_LINE
from tests.builders import answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SECRET = "walrus"
ASKED = f"Human user:\n{SECRET} {{}}\n\nAI assistant:\nNone\n"
ANSWER = answer("harmful", reasoning="x")


def own(name: str) -> dict[str, Any]:
    return {"id": name, "source": "s", "modality": "text", "prompt": f"{SECRET} {name}", "request_label": "harmful"}


def sharegpt(name: str) -> dict[str, Any]:
    said = [{"from": "human", "value": ASKED.format(name)}, {"from": "gpt", "value": ANSWER}]
    return {"conversations": said, "images": [], "sample": {"id": name}}


def messages(name: str) -> dict[str, Any]:
    said = [{"role": "user", "content": ASKED.format(name)}, {"role": "assistant", "content": ANSWER}]
    return {"messages": said, "images": [], "sample": {"id": name}}


def released(name: str) -> dict[str, Any]:
    return {"instruction": "judge", "input": ASKED.format(name), "output": "harmful"}


def stored(name: str) -> dict[str, Any]:
    return {"prompt": ASKED.format(name), "label": "Request: harmful", "predict": ANSWER}


def wild(name: str) -> dict[str, Any]:
    return {"prompt": f"{SECRET} {name}", "response": None, "prompt_harm_label": "harmful", "response_harm_label": None}


Found = tuple[int, list[tuple[str, str]]]


def by_samples(path: Path) -> Found:
    skipped = SkippedRows()
    return len(list(read_samples(path, skipped))), skipped.rows


def by_adapter(name: str) -> Callable[[Path], Found]:
    def read(path: Path) -> Found:
        skipped = SkippedRows()
        return len(list(read_source(adapter_named(name), path.parent, path.parent / "x", skipped))), skipped.rows

    return read


def by_benchmark(path: Path) -> Found:
    loaded = load(benchmark_named("ToxicChat"), path.parent.parent, path.parent / "x")
    return len(loaded.samples), loaded.skipped.rows


def by_stored(path: Path) -> Found:
    read = read_external_predictions(path)
    return len(read.rows) - read.unanswered.total, [*read.skipped.rows, *read.unanswered.rows]


@dataclass(frozen=True)
class Reader:
    """How one layout is written and read; `field` is a text that a row must have."""

    file: str
    row: Callable[[str], dict[str, Any]]
    read: Callable[[Path], Found]
    field: str
    whole: bool = False
    """Whether the file is one JSON document."""


READERS = {
    "samples": Reader("train.jsonl", own, by_samples, "prompt"),
    "samples, packed": Reader("train.jsonl.gz", own, by_samples, "prompt"),
    "samples, a list": Reader("rows.json", own, by_samples, "prompt", whole=True),
    "samples, lines in .json": Reader("rows.json", own, by_samples, "prompt"),
    "ShareGPT, a list": Reader("train.json", sharegpt, by_adapter("sharegpt"), "conversations", whole=True),
    "ShareGPT, lines": Reader("train.jsonl", sharegpt, by_adapter("sharegpt"), "conversations"),
    "ShareGPT, lines in .json": Reader("train.json", sharegpt, by_adapter("sharegpt"), "conversations"),
    "released": Reader("Text.json", messages, by_adapter("guardreasoner-vltrain"), "messages", whole=True),
    "released test": Reader("test/ToxicChat.json", released, by_benchmark, "input", whole=True),
    "released test, lines": Reader("test/ToxicChat.json", released, by_benchmark, "input"),
    "stored": Reader("generated_predictions.jsonl", stored, by_stored, "label"),
    "stored, a list": Reader("generated_predictions.json", stored, by_stored, "label", whole=True),
}


def encoded(row: Any) -> bytes:
    return json.dumps(row).encode()


def spoilt(kind: str, row: dict[str, Any], field: str) -> bytes:
    """The row with one fault of that kind, as a line."""
    whole = encoded(row)
    text = SECRET.encode()
    match kind:
        case "not JSON":
            return whole[:-9]
        case "not an object":
            return encoded([SECRET])
        case "wrong type":
            return encoded({**row, field: 5})
        case "missing field":
            missing = "id" if field == "prompt" else field  # a sample may do without a prompt
            return encoded({name: value for name, value in row.items() if name != missing})
        case "null field":
            return encoded({**row, field: None} if field != "prompt" else {**row, "id": None})
        case "nested list":
            return encoded({**row, field: [[SECRET]]})
        case "NaN":
            return encoded({**row, field: float("nan")})
        case "invalid UTF-8":
            return whole.replace(text, b"\xff\xfe") if text in whole else whole + b"\xff"
        case "lone surrogate":
            return whole.replace(text, rb"\ud800")
        case "NUL":
            return whole.replace(b'": ', b'"\0: ', 1)
        case "nested without end":
            return b"[" * 100_000 + b"]" * 100_000
    raise AssertionError(kind)


KINDS = (
    "not JSON", "not an object", "wrong type", "missing field", "null field", "nested list", "NaN", "invalid UTF-8",
    "lone surrogate", "NUL", "nested without end",
)  # fmt: skip
IN_PROMPT = {"invalid UTF-8", "lone surrogate"}
"""No fault of a stored answer: only whether there was a response is read off its prompt."""
CASES = [(name, kind) for name in READERS for kind in KINDS if not ("stored" in name and kind in IN_PROMPT)]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_one_bad_row_is_named_and_the_rest_is_read(name: str, kind: str, tmp_path: Path) -> None:
    reader = READERS[name]
    path = tmp_path / reader.file
    path.parent.mkdir(exist_ok=True)
    lines = [encoded(reader.row(prompt)) for prompt in "abde"]
    lines.insert(2, spoilt(kind, reader.row("c"), reader.field))
    content = b"[\n" + b",\n".join(lines) + b"\n]\n" if reader.whole else b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    read, bad = reader.read(path)
    assert read == 4
    ((place, reason),) = bad
    assert place in (f"{path.name}, line 3", f"{path.name}, record 3", f"{path.name}, line 4")  # `[` has its own line
    assert reason
    assert SECRET not in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("wrong type", "prompt: input should be a valid string"),
        ("missing field", None),
        ("null field", "id: input should be a valid string"),
        ("nested list", "prompt: input should be a valid string"),
        ("lone surrogate", "prompt: not UTF-8"),
        ("invalid UTF-8", "not UTF-8"),
    ],
)
def test_the_field_is_named(kind: str, reason: str | None, tmp_path: Path) -> None:
    field = "id" if kind == "missing field" else "prompt"
    path = tmp_path / "train.jsonl"
    path.write_bytes(spoilt(kind, own("a"), field) + b"\n")
    assert by_samples(path) == (0, [("train.jsonl, line 1", reason or "id: field required")])
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: .*; fix or remove it"):
        list(read_samples(path))


@pytest.mark.slow
def test_an_enormous_line_costs_its_own_row_only(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(encoded(own("a")) + b"\n")
        for _ in range(MAX_LINE // (1 << 24) + 1):
            stream.write(b"x" * (1 << 24))
        stream.write(b"\n" + encoded(own("b")) + b"\n")
    assert by_samples(path) == (2, [("train.jsonl.gz, line 2", f"longer than {MAX_LINE:,} bytes")])


# --- CSV ------------------------------------------------------------------------------------------------


def toxic(*lines: bytes) -> bytes:
    return b"user_input,human_annotation,toxicity\n" + b"\n".join(lines) + b"\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"walrus,True,1,more", "number of cells differs from number of columns"),
        (b"walrus,True", "number of cells differs from number of columns"),
        (b"walrus \xff,True,1", "prompt: not UTF-8"),
        (b"walrus,True,maybe", "'toxicity' is none of '1', 1, '0', 0"),
        (b" ,True,1", "no text in 'user_input'"),
    ],
)
def test_a_bad_line_of_csv(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "data" / "0124" / "toxic-chat_annotation_train.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(toxic(b"a,True,1", line, b'"b\nc",True,0'))
    skipped = SkippedRows()
    read = list(read_source(adapter_named("toxicchat"), tmp_path, tmp_path / "x", skipped))
    assert [sample.prompt for sample in read] == ["a", "b\nc"]
    assert skipped.rows == [(f"{path.name}, line 3", reason)]


# --- Parquet --------------------------------------------------------------------------------------------


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows whose `prompt` is bytes are written as such, UTF-8 or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name in {name: None for row in rows for name in row}:
        values = [row.get(name) for row in rows]
        if name == "prompt":
            raw = pyarrow.array(
                [value.encode() if isinstance(value, str) else value for value in values], pyarrow.binary()
            )
            arrays[name] = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
        else:
            arrays[name] = pyarrow.array(values)
    parquet.write_table(pyarrow.table(arrays), path)
    return path


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"request_label": "maybe"}, "request_label: input should be 'harmful' or 'unharmful'"),
        ({"id": None}, "id: input should be a valid string"),
        ({"modality": "walrus"}, "modality: input should be 'text', 'image' or 'text-image'"),
        ({"prompt": b"walrus \xff"}, "'prompt': not UTF-8"),
        ({"meta": "{walrus"}, "meta: not JSON"),
        ({"meta": '{"a": NaN}'}, "meta: not representable as JSON"),
        ({"meta": '{"weak": "walrus"}'}, "meta.weak: input should be a valid boolean, unable to interpret input"),
        ({"meta": '{"category": ["walrus"]}'}, "meta.category: input should be a valid string"),
        ({"meta": '{"plain": "walrus"}'}, "meta.plain: input should be a valid dictionary"),
        ({"meta": '{"repeat": -1}'}, "meta.repeat: input should be greater than or equal to 0"),
        ({"modality": "image"}, "modality: 'image', but there is no image"),
    ],
)
def test_a_bad_row_of_parquet(bad: dict[str, Any], reason: str, tmp_path: Path) -> None:
    rows = [{**own(name), "meta": "{}"} for name in "abcde"]
    path = write_parquet(tmp_path / "rows.parquet", [*rows[:2], {**rows[2], **bad}, *rows[3:]])
    skipped = SkippedRows()
    assert [row.id for row in read_parquet(path, skipped)] == ["a", "b", "d", "e"]
    assert skipped.rows == [("rows.parquet, row 3", reason)]
    with pytest.raises(DataError, match=r"rows\.parquet, row 3: .*; fix or remove it"):
        list(read_parquet(path))
    assert by_samples(path) == (4, [("rows.parquet, row 3", reason)])


@pytest.mark.parametrize("column", ["id", "source", "modality"])
def test_a_missing_column_is_named(column: str, tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "rows.parquet", [{key: value for key, value in own("a").items() if key != column}] * 3
    )
    with pytest.raises(DataError, match=f"no column '{column}'; add it: samples need id, source, modality"):
        list(read_parquet(path))


@pytest.mark.parametrize("column", ["prompt", "request_label"])
def test_a_column_that_may_be_absent(column: str, tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "rows.parquet", [{key: value for key, value in own("a").items() if key != column}] * 3
    )
    assert len(list(read_parquet(path))) == 3


def test_a_bad_row_of_somebody_elses_parquet(tmp_path: Path) -> None:
    path = tmp_path / "train" / "wildguard_train.parquet"
    write_parquet(path, [wild("a"), {**wild("b"), "prompt": b"walrus \xff"}, wild("c")])
    skipped = SkippedRows()
    read = list(read_source(adapter_named("wildguardtrain"), tmp_path, tmp_path / "x", skipped))
    assert [sample.id for sample in read] == ["wildguardtrain/0", "wildguardtrain/2"]
    assert skipped.rows == [("wildguard_train.parquet, row 2", "'prompt': not UTF-8")]


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no.jsonl", "no.json", "no.parquet", "no.jsonl.gz"])
def test_a_missing_file_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.[a-z.]+: cannot be read \(No such file or directory\); check the path"):
        list(read_samples(tmp_path / name))


def test_a_list_that_ends_early_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"[\n" + b",\n".join(encoded(own(name)) for name in "abc") + b",\n")
    with pytest.raises(DataError, match=r"rows\.json, line 5: not JSON; correct it there, or download the file again"):
        list(read_samples(path, SkippedRows()))


def test_a_document_that_breaks_somewhere_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    text = json.dumps([own("a"), own("b")], indent=2)
    path.write_text(text.replace('"source": "s"', '"source": s', 1))
    with pytest.raises(DataError, match=r"rows\.json, line 4: not JSON"):
        list(read_samples(path, SkippedRows()))
