"""The commands that measure guards: what they write, print and refuse."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.cli import evaluation as cli_evaluation
from guardreasoner_vl.cli.errors import ERROR, OK
from guardreasoner_vl.corpus.store import CorpusInfo, write_corpus
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.sources.jsonl import is_held_out
from guardreasoner_vl.types import Sample
from tests.builders import answer, write_rows
from tests.cli.test_app import invoke
from tests.scripted_guard import scripted_guard
from tests.stages.test_evaluate import ROWS
from tests.training import toy

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_evaluation, "be_quiet", lambda: None)
    monkeypatch.setattr(Guard, "load", lambda *_, policy, **__: scripted_guard(policy))


@pytest.mark.slow
def test_evaluate_writes_predictions_figures_and_both_reports(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "toy.jsonl", ROWS)
    out = tmp_path / "out"
    result = invoke("evaluate", "--benchmark", rows, "--out", out)
    assert (result.exit_code, result.stdout.strip()) == (OK, str(out / "report.md"))
    written = {path.name for path in out.iterdir()}
    assert {"predictions.jsonl", "results.json", "evaluation.json", "report.md", "report.html"} < written
    assert "request_f1.svg" in written
    report = (out / "report.md").read_text()
    assert "always harmful" in report
    assert all(name in written for name in ("request_f1.svg", "response_f1.svg"))
    assert "BAD" not in report + (out / "predictions.jsonl").read_text() + (out / "report.html").read_text()


@pytest.mark.slow
def test_evaluate_judges_the_held_out_rows_of_a_recipe(tmp_path: Path) -> None:
    held_out = [{"id": str(number), **toy.row(number)} for number in range(300) if is_held_out(str(number))]
    toy.write_data(tmp_path / "data", [*toy.rows(60), *held_out])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(toy.recipe(epochs=1).model_dump(mode="json")))
    asked = ("evaluate", "--recipe", recipe, "--data", tmp_path / "data")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    result = invoke(*asked, "--benchmark", rows, "--out", tmp_path / "out")
    assert result.exit_code == OK, result.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    assert "hashed n-grams" in report
    assert f"| all | {len(held_out) + len(ROWS)} |" in report
    missing = invoke("evaluate", "--recipe", recipe, "--out", tmp_path / "other")
    assert missing.exit_code == ERROR
    assert "--recipe needs --data" in missing.stderr
    toy.write_data(tmp_path / "none", toy.rows(60))
    none = invoke("evaluate", "--recipe", recipe, "--data", tmp_path / "none", "--out", tmp_path / "third")
    assert none.exit_code == ERROR
    assert "none of the recipe's rows is held out" in none.stderr


def test_calibrate_takes_the_test_rows_of_a_corpus_or_some_of_them(tmp_path: Path) -> None:
    rows = [
        Sample(
            id=f"{split}-{number}",
            source="toy" if number < 70 else "noisy",
            split=split,
            modality="text",
            prompt=f"{'BAD' if number % 2 else 'fine'} {number}",
            request_label="harmful" if number % 2 else "unharmful",
        )
        for split in ("train", "test")
        for number in range(90)
    ]
    write_corpus(tmp_path / "corpus", CorpusInfo(name="toy"), rows)
    for name, most in (
        ("all.json", ()),
        ("some.json", ("--rows", 60)),
        ("clean.json", ("--exclude", "noisy")),
    ):
        result = invoke("calibrate", "--data", tmp_path / "corpus", "--out", tmp_path / name, *most)
        assert result.exit_code == OK, result.stderr
    whole, first_rows, clean = (
        json.loads((tmp_path / name).read_text()) for name in ("all.json", "some.json", "clean.json")
    )
    assert (whole["data"], whole["fast"]["request"]["measured"]["rows"]) == ("corpus", 90)
    assert first_rows["fast"]["request"]["measured"]["rows"] == 60
    assert clean["fast"]["request"]["measured"]["rows"] == 70
    typo = invoke("calibrate", "--data", tmp_path / "corpus", "--out", tmp_path / "typo.json", "--exclude", "nosiy")
    assert typo.exit_code == ERROR
    assert "no row is of the source nosiy" in typo.stderr


@pytest.mark.slow
def test_evaluate_excludes_a_benchmark_from_the_total(tmp_path: Path) -> None:
    rows, noisy = write_rows(tmp_path / "toy.jsonl", ROWS), write_rows(tmp_path / "noisy.jsonl", ROWS[:1])
    asked = ("evaluate", "--benchmark", rows, "--benchmark", noisy, "--out", tmp_path / "out")
    assert invoke(*asked, "--exclude-from-total", "noisy").exit_code == OK
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"| all | {len(ROWS)} |" in report
    assert "Excluded from every figure but the benchmark's own line: noisy." in report
    typo = invoke(*asked, "--exclude-from-total", "nosiy")
    assert typo.exit_code == ERROR
    assert "use toy, noisy" in typo.stderr


@pytest.mark.slow
def test_another_threshold_is_another_evaluation(tmp_path: Path) -> None:
    asked = ("evaluate", "--benchmark", write_rows(tmp_path / "toy.jsonl", ROWS), "--out", tmp_path / "out")
    assert invoke(*asked).exit_code == OK
    changed = invoke(*asked, "--threshold", "0.9")
    assert changed.exit_code == ERROR
    assert "changed: guard.thresholds); restore them or name a new output" in changed.stderr


def test_shieldgemma_runs_here(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "toy.jsonl", ROWS)
    asked = ("evaluate", "--benchmark", rows, "--guard", "shieldgemma-2", "--out", tmp_path / "out")
    for more, words in (
        ((), "give --model"),
        (("--model", "google/x", "--base-url", "http://localhost"), "no --base-url"),
        (("--model", tmp_path / "nowhere"), "no such folder"),
    ):
        result = invoke(*asked, *more)
        assert result.exit_code == ERROR
        assert words in result.stderr


@pytest.mark.slow
def test_compare_puts_evaluations_beside_each_other(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "toy.jsonl", ROWS)
    for mode in ("slow", "fast"):
        assert invoke("evaluate", "--benchmark", rows, "--mode", mode, "--out", tmp_path / mode).exit_code == OK
    result = invoke("compare", tmp_path / "slow", tmp_path / "fast")
    assert result.exit_code == OK
    assert "scripted, slow (slow)" in result.stdout
    assert "McNemar" in result.stdout
    assert invoke("compare", tmp_path / "slow", "--out", tmp_path / "board.md").stdout == ""
    assert (tmp_path / "board.md").read_text().startswith("# Guards compared")


def test_score_counts_by_the_rule_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "generated_predictions.jsonl"
    row = {"prompt": "Human user:\nx\n\nAI assistant:\nNone", "label": "Request: unharmful", "predict": "?"}
    path.write_text(json.dumps(row) + "\n" + json.dumps({"label": "Request: harmful"}) + "\n")
    strict, release = (invoke("score", path, "--rule", rule) for rule in ("strict", "guardreasoner"))
    assert "| request | 2 | 2 |" in strict.stdout
    assert "| request | 2 | 2 |" in release.stdout  # the script leaves a broken answer to a harmful row out
    message = "not answered, counted as wrong: 1 rows (no text in 'predict'): generated_predictions.jsonl, line 2"
    assert message in strict.stderr


def test_the_target_option_of_score_says_what_a_bare_label_judges(tmp_path: Path) -> None:
    path = tmp_path / "generated_predictions.jsonl"
    asked = "Human user:\nx\n\nAI assistant:\ny\n"
    rows = [
        {"prompt": asked, "label": "harmful", "predict": answer("unharmful", "harmful")},
        {"prompt": asked, "label": " Unharmful\n", "predict": answer("unharmful", "unharmful")},
        {"prompt": asked, "label": "refusal", "predict": answer("unharmful", "harmful")},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    response, request, neither = (
        invoke("score", path, *options) for options in (["--target", "response"], ["--target", "request"], [])
    )
    assert "| response | 2 | 2 | 100.0 |" in response.stdout
    assert "| request | 2 | 2 | 0.0 |" in request.stdout
    assert "another task" in response.stderr
    assert neither.exit_code == ERROR
    assert "--target request or --target response" in neither.stderr
    gold = write_rows(tmp_path / "toy.jsonl", ROWS)
    assert "--gold" in invoke("score", path, "--gold", gold, "--target", "request").stderr


@pytest.mark.slow
def test_another_guard_needs_its_server(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "toy.jsonl", ROWS)
    ask = ("evaluate", "--benchmark", rows, "--out", tmp_path / "out", "--guard")
    assert "--guard needs --base-url" in invoke(*ask, "wildguard").stderr
    server = ("--base-url", "http://127.0.0.1:9/v1", "--model", "w")
    assert "unknown guard 'odd'" in invoke(*ask, "odd", *server).stderr
    assert invoke(*ask, "openai-moderation", *server).exit_code == OK  # nobody answers: every row is an error
    assert "| 0.0 |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evaluate", "--out", "DIR/out"), "no --data: give the folder"),
        (("evaluate", "--benchmark", "nonsense", "--data", "DIR", "--out", "DIR/out"), "no benchmark named"),
        (("evaluate", "--data", "DIR", "--out", "DIR/out"), "no test/ToxicChat.json"),
        (("compare", "DIR"), "no evaluation in it"),
        (("score", "DIR/none.jsonl"), "none.jsonl"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    result = invoke(*(argument.replace("DIR", str(tmp_path)) for argument in arguments))
    assert result.exit_code == ERROR
    assert result.stdout == ""
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
