"""All stages in one folder: what each leaves there, that nothing is done twice, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from guardreasoner_vl import Guard
from guardreasoner_vl.cli import app as cli
from guardreasoner_vl.corpus.store import CorpusInfo, read_corpus, write_corpus
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.engines.validation import error_result
from guardreasoner_vl.errors import DataError, EngineError, InputError, RecipeError
from guardreasoner_vl.pipeline import run as pipeline
from guardreasoner_vl.pipeline.ablation import Outcome, ablate, ablation_table, mean_and_interval
from guardreasoner_vl.pipeline.run import STAGES, Run, Stage
from tests.builders import sample
from tests.engines.openai.stub_server import StubServer
from tests.smoke import PATH, short_recipe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


def invoke(*arguments: object, code: int = 0) -> Any:
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    assert done.exit_code == code, done.stderr
    return done


@pytest.fixture(scope="module")
def printed() -> list[str]:
    return []


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, printed: list[str]) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "seed-0" / "base"
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pipeline.run(Run(short_recipe(), folder, folder, printed.append))
    return folder


def test_a_corpus_that_holds_nothing_out_needs_benchmarks(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", CorpusInfo(name="toy"), [sample("a", split="train", request_label="harmful")])
    with pytest.raises(DataError, match=r"corpus: no test and no validation rows .*; name evaluate\.benchmarks"):
        pipeline.benchmarks(Run(short_recipe(), tmp_path, tmp_path, print))


def test_mine_and_evaluate_ask_a_server_that_is_told_their_models(out: Path, tmp_path: Path) -> None:
    recipe = short_recipe()
    with StubServer() as server:
        sections = {"mine": recipe.mine.model_copy(update={"keep": "all_wrong"}), "evaluate": recipe.evaluate}
        served = {name: section.model_copy(update={"base_url": server.url}) for name, section in sections.items()}
        taken: dict[Stage, Path] = {"curate": out, "sft": out, "grpo": out}
        job = Run(recipe.model_copy(update=served), out, tmp_path, print, taken=taken)
        pipeline.run(job, ["mine", "evaluate"])
    cold_start, guard = str((out / "sft" / "model").resolve()), str((out / "grpo" / "model").resolve())
    assert server.loaded == [cold_start, cold_start, guard]
    assert server.payloads


@pytest.mark.parametrize("stage", ["mine", "evaluate"])
def test_the_recipe_s_limits_reach_the_engine(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage
) -> None:
    def load(model: str, **limits: int) -> None:
        raise EngineError(f"loaded with {sorted(limits.items())}")

    monkeypatch.setattr("guardreasoner_vl.engines.transformers_engine.TransformersEngine.load", load)
    recipe = short_recipe()
    limited = {
        name: getattr(recipe, name).model_copy(update={"max_rows": 3, "max_tokens": 999})
        for name in ("mine", "evaluate")
    }
    taken: dict[Stage, Path] = {"curate": out, "sft": out, "grpo": out}
    job = Run(recipe.model_copy(update=limited), out, tmp_path, print, taken=taken)

    with pytest.raises(EngineError, match=r"loaded with \[\('max_rows', 3\), \('max_tokens', 999\)\]"):
        pipeline.run(job, [stage])


def test_an_empty_address_does_not_load_the_model_here(tmp_path: Path) -> None:
    recipe = short_recipe()
    section = recipe.evaluate.model_copy(update={"base_url": ""})
    job = Run(recipe.model_copy(update={"evaluate": section}), tmp_path, tmp_path, print)
    with pytest.raises(EngineError, match="base_url is not a web address"):
        pipeline.evaluated(job, "sft", tmp_path)


def test_every_stage_leaves_its_work(out: Path, printed: list[str]) -> None:
    assert [line for line in printed if line in STAGES] == list(STAGES)
    hard = {row.id for row in read_corpus(out / "mine")}
    rl_set = list(read_corpus(out / "augment"))
    assert hard == {row.id for row in rl_set if row.source != "augmented"}
    assert 0.1 < sum(row.source == "augmented" for row in rl_set) / len(rl_set) < 0.3
    steps = [json.loads(line)["step"] for line in (out / "grpo" / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]
    assert (out / "grpo" / "training.svg").read_text().startswith("<svg")
    for name in ("sft", "grpo"):
        assert "| written |" in (out / "evaluate" / name / "report.md").read_text()
    assert "requests\n\n| " in "\n".join(printed)


def test_the_guard_can_be_asked(out: Path) -> None:
    with Guard.load(str(out / "grpo" / "model")) as guard:
        verdict = guard.moderate("how to bake bread", mode="fast")
    assert verdict.error is None


def test_what_is_done_is_not_done_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    lines: list[str] = []
    monkeypatch.chdir(out)
    pipeline.run(Run(short_recipe(), out, out, lines.append))
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert [line for line in lines if line in STAGES] == list(STAGES)


def test_another_recipe_is_refused_by_the_names_of_its_keys(out: Path) -> None:
    changed = short_recipe(grpo={"learning_rate": 1e-3, "clip": {"schedule": "constant"}})
    with pytest.raises(RecipeError, match=r"changed: grpo\.clip\.schedule, grpo\.learning_rate"):
        pipeline.run(Run(changed, out, out, lambda _: None))


def test_keys_that_change_no_result_may_change(out: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(folder / "evaluate")  # its settings name the model's folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    changed = short_recipe(
        synthesize={"concurrency": 3, "max_cost": 9.0},
        grpo={"pass_tokens": 4096, "save_every": 2},
        evaluate={"limit": 13},
    )
    pipeline.run(Run(changed, folder, folder, lambda _: None))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len((folder / "evaluate" / "sft" / "predictions.jsonl").read_text().splitlines()) == 13


def test_what_no_stage_has_read_yet_may_change(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pipeline.run(Run(short_recipe(), out, folder, lambda _: None), ["curate", "synthesize"])
    changed = short_recipe(grpo={"learning_rate": 1e-3, "evaluate_rows": 3}, mine={"limit": 7}, augment={"share": 0.5})
    pipeline.run(Run(changed, out, folder, lambda _: None), ["curate", "synthesize"])
    with pytest.raises(RecipeError, match=r"changed: synthesize\.attempts"):
        pipeline.run(Run(short_recipe(synthesize={"attempts": 9}), out, folder, lambda _: None), ["curate"])


def test_rows_that_the_engine_failed_are_no_finished_mining(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(folder / "mine")
    generate, asked = TransformersEngine.generate, []

    def ill(failing: int) -> Any:
        def generated(engine: TransformersEngine, requests: Any) -> Any:
            asked.append(len(requests))
            return [error_result(EngineError("out of order"))] * failing + generate(engine, requests[failing:])

        return generated

    job = Run(short_recipe(), folder, folder, lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", ill(8))
        with pytest.raises(DataError, match="2 rows got no answer from the engine: run the same command to resume"):
            pipeline.run(job, ["mine"])
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", ill(0))
        pipeline.run(job, ["mine"])
    assert asked == [8]
    assert {row.id for row in read_corpus(folder / "mine")} == {row.id for row in read_corpus(out / "mine")}
    monkeypatch.setattr(TransformersEngine, "load", lambda *_, **__: pytest.fail("asked again"))
    pipeline.run(job, ["mine"])
    with pytest.raises(DataError, match=r"changed: mine\.keep\)"):
        pipeline.run(Run(short_recipe(mine={"keep": "all_wrong"}), folder, folder, lambda _: None), ["mine"])


@pytest.mark.parametrize(
    ("stage", "before"),
    [("synthesize", "curate"), ("mine", "sft"), ("augment", "mine"), ("grpo", "curate"), ("evaluate", "sft")],
)
def test_a_stage_names_the_one_that_it_needs(stage: str, before: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"run the stage {before} first"):
        pipeline.run(Run(short_recipe(), tmp_path, tmp_path, lambda _: None), [stage])


def test_several_processes_only_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="curate, mine cannot run on several processes: give a launcher only"):
        pipeline.run(Run(short_recipe(), tmp_path, tmp_path, lambda _: None), ["curate", "sft", "mine"])


def test_the_stages_are_commands(out: Path, tmp_path: Path) -> None:
    recipe, model = out / "recipe.json", out / "sft" / "model"
    mined = invoke("mine", recipe, "--data", out / "corpus", "--model", model, "--out", tmp_path / "mine")
    assert "rows are hard (mixed)" in mined.stdout
    asked = [
        {json.loads(line)["id"] for line in (folder / "candidates.jsonl").read_text().splitlines()}
        for folder in (tmp_path / "mine", out / "mine")
    ]
    assert asked[0] == asked[1]
    joined = invoke("augment", recipe, "--data", tmp_path / "mine", "--out", tmp_path / "augment")
    assert "joined ones" in joined.stdout
    options = ("--data", tmp_path / "augment", "--validation", out / "corpus", "--verify-parity")
    trained = invoke("grpo", recipe, "--model", model, *options, "--out", tmp_path / "run")
    assert "compared with stock TRL" in trained.stderr
    assert Path(trained.stdout.split()[-1]) == tmp_path / "run" / "grpo" / "model"


def test_a_plan_on_the_command_line(tmp_path: Path) -> None:
    planned = invoke("run", PATH, "--out", tmp_path / "none", "--plan", "--stages", "grpo")
    assert "80 rollout batches, 160 updates" in planned.stdout
    assert not (tmp_path / "none").exists()
    small = invoke("run", "3b", "--out", tmp_path / "none", "--plan", "--gpus", "1", "--gpu-memory", "24", code=1)
    assert "mine: does not fit 24.0 GB: set mine.max_rows: 64" in small.stdout
    unknown = invoke("run", PATH, "--out", tmp_path / "none", "--stages", "grpo,bake", code=2)
    assert "unknown stage 'bake': use curate, synthesize" in unknown.stderr


def test_a_model_that_is_nowhere_is_said_before_anything_is_written(tmp_path: Path) -> None:
    folders = ("--data", tmp_path / "rl", "--out", tmp_path / "run")
    refused = invoke("grpo", PATH, "--model", "./nowhere", *folders, code=2)
    assert "./nowhere: no such folder; give" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_an_ablation_takes_over_what_a_variant_does_not_change(out: Path) -> None:
    runs = out.parent.parent
    lines: list[str] = []
    only = ("R-SFT", "full", "without augmentation")
    path = ablate(short_recipe(), out, runs, only=only, tell=lines.append)
    table = path.read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[4:]] == [f"| {name}" for name in only]
    folder = runs / "seed-0" / "without-augmentation"
    assert sorted(one.name for one in folder.iterdir() if one.is_dir()) == ["augment", "evaluate", "grpo"]
    assert all(row.source != "augmented" for row in read_corpus(folder / "augment"))
    assert json.loads((folder / "recipe.json").read_text())["augment"]["share"] == 0
    assert (runs / "ablation.svg").read_text().startswith("<svg")


def test_an_unknown_variant_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no variant 'fill': use SFT, "):
        ablate(short_recipe(), tmp_path, tmp_path, only=("fill",))


def test_gains_are_counted_seed_by_seed() -> None:
    outcomes = {
        "R-SFT": [Outcome(0.5, 0.5, None, 1.0, 60.0), Outcome(0.7, 0.7, None, 1.0, 62.0)],
        "full": [Outcome(0.6, 0.6, None, 1.0, 60.0), Outcome(0.9, 0.9, None, 1.0, 60.0)],
    }
    start, full = ablation_table(outcomes)[1:]
    assert start == [
        "R-SFT",
        "60.0 \u00b1 127.1",
        "\u2013",
        "60.0 \u00b1 127.1",
        "\u2013",
        "100.0 \u00b1 0.0",
        "61.0 \u00b1 12.7",
        "-1.0 \u00b1 12.7",
    ]
    assert full[-1] == "\u2013"
    assert full[2] == "15.0 \u00b1 63.5"  # 10 and 20: 12.706 * 7.071 / sqrt(2)


def test_intervals_by_hand() -> None:
    assert mean_and_interval([3.0]) == (3.0, None)
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5)
