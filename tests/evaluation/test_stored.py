"""Answers that other programs stored: the authors' file, and answers by id against a gold file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.scoring import score_table
from guardreasoner_vl.evaluation.stored import read_stored

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ANSWER = "<think>\nfine\n</think>\n<result>\nAnswers:\nRequest: {}\nResponse: {}\n</result>"
ASKED = "Human user:\nhow to bake a cake\n\nAI assistant:\n{}"


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def released(label: str, answer: str, response: str = "None") -> dict[str, str]:
    return {"prompt": ASKED.format(response), "label": label, "predict": answer}


def test_the_authors_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "generated_predictions.jsonl",
        [
            released("Request: harmful\nResponse: None", ANSWER.format("harmful", "None")),
            released("Request: harmful\nResponse: harmful", ANSWER.format("unharmful", "harmful"), "Here it is."),
            released("Request: unharmful\nResponse: None", "I would rather not."),
            released("Request: perhaps", ANSWER.format("harmful", "None")),
            {"prompt": "x", "label": "Request: harmful"},
        ],
    )
    rows, set_aside = read_stored(path)
    assert [(row.request, row.response, row.has_response) for row in rows] == [
        ("harmful", None, False),
        ("harmful", "harmful", True),
        ("unharmful", None, False),
    ]
    assert set_aside.reasons == {"label 'perhaps' is none of harmful, unharmful, harmless": 1, "no 'predict'": 1}
    table = score_table(rows, "strict")
    assert table[1][:4] == ["request", "3", "3", "50.0"]
    assert table[2][:4] == ["response", "1", "1", "100.0"]
    assert score_table(rows, "guardreasoner")[1][:4] == ["request", "3", "4", "40.0"]  # the broken answer counts twice


def test_answers_by_id(tmp_path: Path) -> None:
    gold = write(
        tmp_path / "gold.jsonl",
        [
            {"id": "a", "source": "t", "modality": "text", "prompt": "hi", "request_label": "unharmful"},
            {"id": "b", "source": "t", "modality": "text", "prompt": "BAD", "request_label": "harmful"},
        ],
    )
    answers = [{"id": name, "predict": ANSWER.format("harmful", "None")} for name in "ab"]
    rows, set_aside = read_stored(write(tmp_path / "p.jsonl", [*answers, answers[0]]), gold)
    assert score_table(rows, "strict")[1][3] == "66.7"
    assert set_aside.reasons == {"its id stands there already": 1}
    for wrong in ([answers[0]], [*answers, {"id": "c", "predict": ""}]):
        with pytest.raises(DataError, match="give the file that was judged"):
            read_stored(write(tmp_path / "p.jsonl", wrong), gold)


@pytest.mark.parametrize("rows", [[], [{"text": "x"}], [{"prompt": "x", "label": "", "predict": "y"}]])
def test_a_file_of_another_layout_is_refused(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(DataError, match="no row to score"):
        read_stored(write(tmp_path / "p.jsonl", rows))
