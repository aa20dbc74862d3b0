"""Rows as people keep them become a source folder; what cannot be used is named."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.sources.plain_rows import import_rows
from tests.made_images import image

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.types import Sample


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def imported(tmp_path: Path, *rows: Any) -> list[Sample]:
    import_rows(write(tmp_path / "rows.jsonl", *rows), tmp_path / "out", "desk")
    return list(read_samples(tmp_path / "out" / "train.jsonl"))


def test_a_prompt_and_a_label_suffice(tmp_path: Path) -> None:
    first, second = imported(tmp_path, {"prompt": "Hello", "label": "safe"}, {"prompt": "Boo", "label": 1})
    assert (first.prompt, first.request_label, first.modality, first.source) == ("Hello", "unharmful", "text", "desk")
    assert (second.request_label, second.response_label) == ("harmful", None)
    assert first.id != second.id


def test_ids_follow_the_content(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {number}", "label": "safe"} for number in range(3)]
    ids = {row.prompt: row.id for row in imported(tmp_path, *rows)}
    import_rows(write(tmp_path / "again.jsonl", *reversed(rows)), tmp_path / "again", "desk")
    assert {row.prompt: row.id for row in read_samples(tmp_path / "again" / "train.jsonl")} == ids


def test_responses_and_images(tmp_path: Path) -> None:
    (tmp_path / "shots").mkdir()
    (tmp_path / "shots" / "a.png").write_bytes(image(30, 20).png)
    answered, shown = imported(
        tmp_path,
        {"prompt": "Open?", "response": "Until six.", "request_label": "safe", "response_label": "safe"},
        {"image": "shots/a.png", "label": "harmless", "id": 7},
    )
    assert (answered.response, answered.response_label) == ("Until six.", "unharmful")
    assert (shown.id, shown.modality, shown.prompt) == ("7", "image", "")
    assert (tmp_path / "out" / shown.images[0]).resolve() == (tmp_path / "shots" / "a.png").resolve()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "no label"),
        ({"prompt": "a", "label": "maybe"}, "label: not one of"),
        ({"label": "safe"}, "no prompt, image or response"),
        ({"prompt": "  ", "label": "safe"}, "no prompt, image or response"),
        ({"prompt": 3, "label": "safe"}, "prompt: not a text"),
        ({"prompt": "a", "response": "b", "label": "safe"}, "say request_label or response_label"),
        ({"prompt": "a", "response_label": "safe"}, "there is no response"),
        ({"prompt": "a", "label": "safe", "imgs": []}, "unknown field 'imgs'"),
        ({"images": [3], "label": "safe"}, "images: not a path"),
        ({"prompt": "good", "label": "safe"}, "repeated id or content"),
        ({"prompt": "\ud800", "label": "safe"}, "prompt: not UTF-8"),
        ({"prompt": "<video> look", "label": "safe"}, "only texts and images are read"),
        (["prompt"], "not an object"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "good", "label": "safe"}, row)
    report = import_rows(path, tmp_path / "out", "desk")
    assert report.rows == 1
    ((place, why),) = report.skipped.rows
    assert (place, reason in why) == ("rows.jsonl, line 2", True)


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt,label\nHello,safe\n"a, b",unsafe\n', "utf-8")
    report = import_rows(tmp_path / "rows.csv", tmp_path / "out", "desk")
    assert report.labels == {("unharmful", None): 1, ("harmful", None): 1}


def test_nothing_usable_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "a"})
    with pytest.raises(DataError, match=r"no row can be used \(.*\); give rows with content and a label"):
        import_rows(path, tmp_path / "out", "desk")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="new folder"):
        import_rows(path, tmp_path / "out", "desk")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({}, optional={"prompt": JSON, "label": JSON, "images": JSON}), max_size=4))
def test_any_row_is_read_or_skipped(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("plain")
    path = write(folder / "rows.jsonl", {"prompt": "good one", "label": "safe"}, *rows)
    report = import_rows(path, folder / "out", "desk")
    assert report.rows + report.skipped.total == 1 + len(rows)
    assert len(list(read_samples(folder / "out" / "train.jsonl"))) == report.rows
