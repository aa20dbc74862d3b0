"""The table of languages: which rows it takes, and its counts by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.languages import language_of, main, wrong_by_language
from guardreasoner_vl.sources.jsonl import is_held_out
from guardreasoner_vl.types import Exchange, Sample
from tests.builders import write_rows
from tests.scripted_guard import scripted_guard

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def row(number: int, prompt: str, label: str, **meta: Any) -> Sample:
    return Sample.model_validate(
        {
            "id": f"r-{number}",
            "source": "toy",
            "modality": "text",
            "prompt": prompt,
            "request_label": label,
            "meta": meta,
        }
    )


def test_wrong_labels_are_counted_by_language_and_kind() -> None:
    rows = [
        row(1, "BAD", "harmful", lang="de"),
        row(2, "gut", "harmful", lang="de"),
        row(3, "BROKEN", "harmful", lang="German"),
        row(4, "gut", "unharmful", language="de"),
        row(5, "BAD", "unharmful", lang="fr", task="toxicity"),
        row(6, "BAD", "harmful"),
    ]
    assert [language_of(each) for each in rows] == ["de", "de", "de", "de", "fr", None]
    verdicts = scripted_guard().moderate_batch(Exchange(each.prompt) for each in rows)
    assert wrong_by_language(zip(rows, verdicts, strict=True)) == {
        "de": {("request", "harmful"): "2 of 3", ("request", "unharmful"): "0 of 1"},
        "fr": {("remark", "unharmful"): "1 of 1"},
    }


def test_rows_without_a_language_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = next(f"toy-{number}" for number in range(1000) if is_held_out(f"toy-{number}"))
    write_rows(tmp_path / "toy" / "train.jsonl", [{"id": name, "prompt": "hi", "request_label": "unharmful"}])
    (tmp_path / "manifest.csv").write_text("source,file,use\ntoy,train.jsonl,open\n")
    assert main(["--data", str(tmp_path)]) == 2
    assert "no held-out row names its language; give the folder" in capsys.readouterr().err
    assert main(["--data", str(tmp_path / "nowhere")]) == 2
