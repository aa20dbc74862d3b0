"""The commands that make corpora: what they write, print and refuse, and how they end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.cli.corpus import INCOMPLETE
from guardreasoner_vl.cli.errors import ERROR, OK
from guardreasoner_vl.corpus.store import read_corpus
from guardreasoner_vl.sources.jsonl import is_held_out
from tests.builders import write_rows
from tests.cli.test_app import invoke
from tests.stages.test_curate import TOY, toy_rows

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result


pytestmark = pytest.mark.slow


def curated(folder: Path, rows: list[dict[str, Any]]) -> Result:
    """A corpus in `folder/corpus`."""
    write_rows(folder / "data" / "toy" / "train.jsonl", rows)
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"name": "toy", "data": {"sources": [TOY], "duplicates": {}}}))
    return invoke("curate", recipe, "--data", folder / "data", "--out", folder / "corpus")


def test_from_a_recipe_to_an_export(tmp_path: Path) -> None:
    result = curated(tmp_path, toy_rows(12))
    corpus = tmp_path / "corpus"
    assert (result.exit_code, result.stderr) == (OK, "")
    assert result.stdout.splitlines() == ["12 of 12 rows", str(corpus / "card.md")]
    done = invoke("synthesize", corpus, "--teacher", "rules")
    assert done.exit_code == OK
    assert done.stdout.startswith("12 of 12 rows have reasoning, 0 remain; 12 answers")
    assert all(row.reasoning for row in read_corpus(corpus))
    again = invoke("synthesize", corpus, "--teacher", "rules")
    assert again.stdout == done.stdout  # nothing is asked twice
    assert invoke("corpus", "stats", corpus).stdout.strip() == str(corpus / "card.md")
    assert "| text | 12 | 12 |" in (corpus / "card.md").read_text()
    assert invoke("corpus", "check", corpus).stdout == "12 rows, 0 faults\n"
    for layout in ("guardreasoner", "sharegpt"):
        out = tmp_path / layout
        assert invoke("corpus", "export", corpus, "--layout", layout, "--out", out).stdout == f"12 rows in {out}\n"
        taken = invoke("corpus", "export", corpus, "--layout", layout, "--out", out)
        assert (taken.exit_code, "name a new folder" in taken.stderr) == (ERROR, True)


def test_the_exit_code_says_that_rows_were_skipped(tmp_path: Path) -> None:
    result = curated(tmp_path, [*toy_rows(3), {"id": "none", "prompt": "no label"}])
    assert result.exit_code == INCOMPLETE
    assert result.stderr == "note: skipped: 1 rows (no label): none\n"
    assert "3 of 4 rows" in result.stdout
    assert "| no label | 1 |" in (tmp_path / "corpus" / "card.md").read_text()


def test_reasoning_of_another_teacher_is_kept_with_a_note(tmp_path: Path) -> None:
    curated(tmp_path, toy_rows(3))
    corpus, empty = tmp_path / "corpus", tmp_path / "none.jsonl"
    invoke("synthesize", corpus, "--teacher", "rules")
    empty.write_text("")
    done = invoke("synthesize", corpus, "--teacher", "openai", "--batch-in", empty)
    note = "note: 3 rows keep another teacher's reasoning; curate into a new --out to ask this one\n"
    assert (done.exit_code, done.stderr) == (OK, note)
    assert invoke("synthesize", corpus, "--teacher", "rules").stderr == ""


def test_held_out_rows_need_no_reasoning(tmp_path: Path) -> None:
    held_out = next(f"h{number}" for number in range(1000) if is_held_out(f"h{number}"))
    curated(tmp_path, [*toy_rows(2), {"id": held_out, "prompt": "a row for validation", "request_label": "unharmful"}])
    done = invoke("synthesize", tmp_path / "corpus", "--teacher", "rules")
    assert (done.exit_code, done.stdout[:32]) == (OK, "2 of 2 rows have reasoning, 0 re")
    assert {row.split: bool(row.reasoning) for row in read_corpus(tmp_path / "corpus")} == {
        "train": True,
        "validation": False,
    }


def test_faults_of_a_corpus_are_named(tmp_path: Path) -> None:
    curated(tmp_path, toy_rows(2))
    first = next(read_corpus(tmp_path / "corpus")).id
    line = {"id": first, "reasoning": "no steps in it", "teacher": "t"}
    (tmp_path / "corpus" / "reasoning.jsonl").write_text(json.dumps(line) + "\n")
    checked = invoke("corpus", "check", tmp_path / "corpus")
    assert checked.exit_code == INCOMPLETE
    assert checked.stdout == f"{first}: reasoning: no steps\n2 rows, 1 faults\n"


def test_the_batch_api_takes_turns(tmp_path: Path) -> None:
    curated(tmp_path, toy_rows(2))
    corpus, asked, answered = tmp_path / "corpus", tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    written = invoke("synthesize", corpus, "--teacher", "openai", "--batch-out", asked)
    assert (written.exit_code, written.stdout) == (OK, f"2 requests in {asked}\n")
    results = []
    for line in asked.read_text().splitlines():
        request = json.loads(line)
        truth = "harmful" if "number 0" in line else "unharmful"
        text = (
            f"<think>\n## Reasoning Step 1\nIt asks for food.\n## Reasoning Step 2\nThat is {truth}.\n</think>\n"
            f"<result>\nAnswers:\nRequest: {truth}\nResponse: None\n</result>"
        )
        body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {}}
        results.append({"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}})
    answered.write_text("".join(json.dumps(row) + "\n" for row in results[:1]))
    first = invoke("synthesize", corpus, "--teacher", "openai", "--batch-in", answered)
    assert first.exit_code == INCOMPLETE
    assert "1 of 2 rows have reasoning, 1 remain" in first.stdout
    answered.write_text("".join(json.dumps(row) + "\n" for row in results))
    second = invoke("synthesize", corpus, "--teacher", "openai", "--batch-in", answered)
    assert (second.exit_code, "2 of 2 rows have reasoning" in second.stdout) == (OK, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("synthesize", "CORPUS", "--teacher", "rules", "--batch-out", "x"), "give --teacher openai"),
        (("synthesize", "CORPUS", "--teacher", "openai", "--model", "mine", "--max-cost", "1"), "no price is known"),
        (("synthesize", "NOWHERE", "--teacher", "rules"), "curate --out"),
        (("corpus", "stats", "NOWHERE"), "curate --out"),
        (("corpus", "check", "NOWHERE"), "curate --out"),
        (("curate", "NOWHERE", "--data", "x", "--out", "y"), "give the path of a YAML recipe"),
    ],
)
def test_wrong_calls_are_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    if "CORPUS" in arguments:
        curated(tmp_path, toy_rows(2))
    places = {"CORPUS": str(tmp_path / "corpus"), "NOWHERE": str(tmp_path / "nowhere")}
    result = invoke(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == ERROR
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
