"""No option is ignored without a word: what another option leaves without effect is refused in one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.cli import evaluation as cli_evaluation
from guardreasoner_vl.cli import moderate as cli_moderate
from guardreasoner_vl.cli.errors import ERROR, OK
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.pipeline import run as pipeline
from tests.builders import write_rows
from tests.cli.test_app import invoke
from tests.scripted_guard import scripted_guard
from tests.smoke import PATH
from tests.stages.test_evaluate import ROWS

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cli_moderate, cli_evaluation):
        monkeypatch.setattr(module, "be_quiet", lambda: None)
    monkeypatch.setattr(Guard, "load", lambda *_, policy, **__: scripted_guard(policy))
    monkeypatch.setattr(pipeline, "run", lambda *_: None)


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == ERROR, result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "internal fault" not in line
    assert all(word in line for word in words), line


POLICY: list[tuple[str, ...]] = [
    ("--threshold", "0.4"),
    ("--preset", "balanced"),  # also where it is the default
    ("--long-input", "refuse"),
    ("--max-new-tokens", "1024"),
    ("--max-new-tokens", "64"),
]


@pytest.mark.parametrize(
    "option",
    [*POLICY, ("--on-error", "allow"), ("--on-error", "block"), ("--model", "x"), ("--engine", "auto"),
     ("--base-url", "http://127.0.0.1:9/v1"), ("--adapter", "x"), ("--ray", "local"), ("--workers", "2")],
)  # fmt: skip
def test_batch_asks_a_service_with_its_own_settings(option: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "x"}\n')
    asked = ("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--url", "http://127.0.0.1:9")
    refused(invoke(*asked, *option), option[0], "--url")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "option",
    [*POLICY, ("--mode", "slow"), ("--mode", "fast"), ("--engine", "openai"), ("--adapter", "x"), ("--ray", "local")],
)
def test_another_guard_judges_in_its_own_way(option: tuple[str, ...], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "toy.jsonl", ROWS)
    asked = ("evaluate", "--benchmark", rows, "--out", tmp_path / "out", "--guard", "wildguard", "--model", "m")
    refused(invoke(*asked, "--base-url", "http://127.0.0.1:9/v1", *option), option[0], "--guard")


def test_workers_are_those_of_a_cluster(tmp_path: Path) -> None:
    refused(invoke(*commands(tmp_path)["batch"], "--workers", "2"), "--workers", "--ray")
    refused(invoke(*commands(tmp_path)["evaluate"], "--workers", "2"), "--workers", "--ray")


def commands(tmp_path: Path) -> dict[str, tuple[object, ...]]:
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "x"}\n')
    rows = write_rows(tmp_path / "toy.jsonl", ROWS)
    return {
        "moderate": ("moderate", "--prompt", "hi"),
        "batch": ("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl"),
        "evaluate": ("evaluate", "--benchmark", rows, "--out", tmp_path / "out"),
    }


@pytest.mark.parametrize("command", ["moderate", "batch", "evaluate"])
@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--preset", "strict", "--calibration", "none"), "--calibration"),
        (("--preset", "balanced", "--calibration", "none"), "--calibration"),
        (("--preset", "strict", "--base-url", "http://127.0.0.1:9/v1"), "--calibration"),
        (("--preset", "strict", "--calibration", "c.json", "--threshold", "0.4"), "--threshold"),
        (("--mode", "fast", "--max-new-tokens", "64"), "--max-new-tokens"),
    ],
)
def test_options_that_another_one_leaves_without_effect(
    command: str, options: tuple[str, ...], word: str, tmp_path: Path
) -> None:
    refused(invoke(*commands(tmp_path)[command], *options), word)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["moderate", "batch", "evaluate"])
@pytest.mark.parametrize("options", [(), ("--mode", "fast"), ("--max-new-tokens", "64"), ("--threshold", "0.4")])
def test_options_that_act_are_taken(command: str, options: tuple[str, ...], tmp_path: Path) -> None:
    result = invoke(*commands(tmp_path)[command], *options)
    assert result.exit_code != ERROR, result.stderr


def test_concurrency_is_a_services(tmp_path: Path) -> None:
    refused(invoke(*commands(tmp_path)["batch"], "--concurrency", "4"), "--concurrency", "--url")


@pytest.mark.parametrize("command", ["evaluate", "robustness"])
def test_data_where_only_files_are_named(command: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "toy.jsonl", ROWS)
    asked = (command, "--benchmark", rows, "--out", tmp_path / "out", "--data", tmp_path)
    refused(invoke(*asked), "--data")


@pytest.mark.slow
def test_a_file_below_the_data_is_a_benchmark(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows-of-mine.jsonl", ROWS)
    asked = ("evaluate", "--benchmark", "rows-of-mine.jsonl", "--out", tmp_path / "out", "--data", tmp_path)
    assert invoke(*asked).exit_code == OK
    assert "rows-of-mine" in (tmp_path / "out" / "report.md").read_text()


def test_gpus_are_for_a_plan(tmp_path: Path) -> None:
    refused(invoke("run", PATH, "--out", tmp_path / "out", "--gpus", "4"), "--gpus", "--plan")
    refused(invoke("run", PATH, "--out", tmp_path / "out", "--gpu-memory", "80"), "--gpu-memory", "--plan")
    refused(invoke("run", PATH, "--out", tmp_path / "out", "--plan", "--gpu-memory", "80"), "--gpu-memory", "--gpus")
    assert not (tmp_path / "out").exists()


def test_no_stages_are_not_all_stages(tmp_path: Path) -> None:
    refused(invoke("run", PATH, "--out", tmp_path / "out", "--stages", ""), "unknown stage ''")


def test_validation_rows_that_nobody_would_judge(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"extends": str(PATH), "grpo": {"evaluate_every": None}}))
    asked = ("grpo", recipe, "--model", tmp_path, "--data", tmp_path, "--out", tmp_path / "out")
    refused(invoke(*asked, "--validation", tmp_path), "--validation", "evaluate_every")


RULES: list[tuple[Any, ...]] = [
    ("--model", "m"),
    ("--base-url", "http://127.0.0.1:9/v1"),
    ("--requests-per-minute", "5"),
    ("--tokens-per-minute", "5"),
    ("--max-cost", "1"),
    ("--max-tokens", "5"),
    ("--price", "1", "2"),
    ("--batch-out", "b.jsonl"),
    ("--batch-in", "b.jsonl"),
]


@pytest.mark.parametrize("option", RULES)
def test_the_rules_ask_no_endpoint(option: tuple[Any, ...], tmp_path: Path) -> None:
    refused(invoke("synthesize", tmp_path, "--teacher", "rules", *option), option[0], "--teacher openai")


@pytest.mark.parametrize("option", [*RULES[1:7], ("--concurrency", "5"), ("--batch-in", "b.jsonl")])
def test_writing_requests_asks_nobody(option: tuple[Any, ...], tmp_path: Path) -> None:
    asked = ("synthesize", tmp_path, "--teacher", "openai", "--batch-out", tmp_path / "out.jsonl")
    refused(invoke(*asked, *option), option[0])


@pytest.mark.parametrize("option", [*RULES[1:6], ("--concurrency", "5")])
def test_taking_results_in_asks_nobody(option: tuple[Any, ...], tmp_path: Path) -> None:
    asked = ("synthesize", tmp_path, "--teacher", "openai", "--batch-in", tmp_path / "in.jsonl")
    refused(invoke(*asked, *option), option[0])
