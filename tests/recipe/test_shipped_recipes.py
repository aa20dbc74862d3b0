"""Every recipe that ships: it is read, planned, its commands are the command line's, and its variants can be built."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from guardreasoner_vl.cli import app as cli
from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.pipeline import ablation
from guardreasoner_vl.pipeline.ablation import ablate, variants
from guardreasoner_vl.pipeline.plan import plan_of
from guardreasoner_vl.pipeline.run import STAGES, TRAINING
from guardreasoner_vl.recipe import Recipe, load_recipe, merged, parse_recipe
from tests.smoke import PATH, short_recipe

RECIPES = sorted(PATH.parent.glob("*.yaml"))
TRAINED = [path for path in RECIPES if load_recipe(path).model]
DATA, OUT = Path("my data/it's here"), Path("-runs/$HOME & more")
LAUNCH = ["accelerate", "launch"]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command and its parameters, read by the command line and not run."""
    assert words[0] == "guardreasoner-vl"
    group: Any = typer.main.get_command(cli.app)
    context, words = group.make_context("guardreasoner-vl", words[1:]), words[1:]
    while hasattr(group, "resolve_command"):
        name, group, words = group.resolve_command(context, words)
        context = group.make_context(name, list(words), parent=context)
    return name, context.params


def launched(words: list[str]) -> tuple[int, list[str]]:
    """Processes that `accelerate launch` would start, and what it would start them with."""
    launch = pytest.importorskip("accelerate.commands.launch", reason="the extra train is not installed")
    options = launch.launch_command_parser().parse_args(words[2:])
    assert options.no_python
    return options.num_processes, [options.training_script, *options.training_script_args]


@pytest.mark.parametrize("name", ["3b", "3b-eco", "7b", "7b-eco"])
def test_the_paper_s_recipes_save_a_checkpoint_every_fourth_rollout_batch(name: str) -> None:
    assert load_recipe(PATH.parent / f"{name}.yaml").grpo.save_every == 4  # all of AdamW's state takes minutes


def test_all_recipes_are_here() -> None:
    names = {path.stem for path in RECIPES}
    papers = {f"{size}{suffix}" for size in ("3b", "7b") for suffix in ("", "-eco", "-released")}
    assert {*papers, "3b-lora", "7b-lora", "smoke", "embedded", "vltrain", "open_corpus"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_what_it_says(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_commands_of_its_head_are_the_command_lines(path: Path) -> None:
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").replace("USD", "1").splitlines()
    commands = [shlex.split(line) for line in whole if line.startswith(("guardreasoner-vl ", "accelerate "))]
    for words in commands:
        command = launched(words)[1] if words[:2] == LAUNCH else words
        _, options = parsed(command)
        assert options


@pytest.mark.parametrize("name", ["3b", "7b"])
def test_the_released_corpus_changes_the_corpus_alone(name: str) -> None:
    """No source but the released one, no row left out, no paid teacher; every other setting is the paper's."""
    base, released = (load_recipe(PATH.parent / f"{stem}.yaml") for stem in (name, f"{name}-released"))
    (source,) = released.data.sources
    assert source.adapter == "guardreasoner-vltrain"
    assert (released.data.duplicates, released.data.balance) == (None, None)
    assert released.synthesize.teacher == "rules"
    changed = {"name": base.name, "data": base.data, "synthesize": base.synthesize}
    assert released.model_copy(update=changed) == base
    assert released.data == load_recipe(PATH.parent / "3b-released.yaml").data


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [0, 4])
@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_what_a_plan_prints_runs_as_it_is(path: Path, gpus: int) -> None:
    text = plan_of(load_recipe(path), path, DATA, OUT, STAGES, gpus)
    printed = [shlex.split(line) for line in text.partition("\n\n")[2].splitlines()]
    stages: list[str] = []
    for words in printed:
        processes, command = launched(words) if words[:2] == LAUNCH else (1, words)
        name, options = parsed(command)
        assert name == "run"
        assert (options["recipe"], options["data"], options["plan"], options["gpus"]) == (path, DATA, False, 0)
        assert options["out"].resolve() == OUT.resolve()
        did = options["stages"].split(",") if options["stages"] else list(STAGES)
        assert processes == (gpus if gpus > 1 and set(did) <= set(TRAINING) else 1)
        stages += did
    assert stages == list(STAGES)


def test_the_command_line_prints_them(tmp_path: Path) -> None:
    asked = ["run", str(PATH), "--data", str(DATA), "--out", str(tmp_path), "--stages", "sft,grpo", "--plan"]
    done = CliRunner().invoke(cli.app, asked)
    _, options = parsed(shlex.split(done.stdout.splitlines()[-1]))
    assert (options["data"], options["out"], options["stages"]) == (DATA, tmp_path, "sft,grpo")


# --- variants -------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, tuple[str, ...]]]:
    """What an ablation would train; nothing is."""
    runs: list[tuple[Recipe, tuple[str, ...]]] = []

    def run(job: Any, stages: Any) -> None:
        runs.append((job.recipe, tuple(stages)))

    outcome = ablation.Outcome(0.5, 0.5, None, 1.0, 9.0)
    monkeypatch.setattr(ablation, "run", run)
    monkeypatch.setattr(ablation, "evaluated", lambda *_: Path())
    monkeypatch.setattr(ablation, "outcome", lambda _: outcome)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_every_variant_can_be_built(path: Path, trained: list[Any], tmp_path: Path) -> None:
    recipe = load_recipe(path)
    ablate(recipe, Path("data"), tmp_path, seeds=2, tell=lambda _: None)
    report = (tmp_path / "ablation.md").read_text()
    assert all(f"\n| {name} |" in report for name in variants(recipe))
    assert {"SFT", "R-SFT", "full", "Eco", "without length reward", "without augmentation"} <= variants(recipe).keys()
    assert {run.seed for run, _ in trained} == {recipe.seed, recipe.seed + 1}


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_eco_is_the_papers(path: Path, trained: list[Any], tmp_path: Path) -> None:
    """A cut-off at a sixth; only in the bounded form also a token cost, without which it does nothing there."""
    recipe = load_recipe(path)
    ablate(recipe, Path("data"), tmp_path, only=("Eco",), tell=lambda _: None)
    reward = trained[-1][0].grpo.reward
    assert reward.beta == pytest.approx(1 / 6)
    assert reward.token_cost == (0.3 if recipe.grpo.reward.form == "bounded" else 0.0)
    assert reward.form == recipe.grpo.reward.form


def test_a_variant_that_changes_nothing_takes_the_whole_run(trained: list[Any], tmp_path: Path) -> None:
    ablate(load_recipe(PATH.parent / "3b-eco.yaml"), Path("data"), tmp_path, only=("full", "Eco"), tell=lambda _: None)
    assert [stages for _, stages in trained] == [STAGES[:-1]] * 2


BOUNDED = {"form": "bounded", "token_cost": 0.1}


@pytest.mark.parametrize("reward", [BOUNDED, {"form": "paper"}, {"form": "plain"}])
def test_every_form_of_the_reward_has_its_variants(reward: dict[str, Any], trained: list[Any], tmp_path: Path) -> None:
    recipe = short_recipe(grpo={"reward": reward})
    ablate(recipe, Path("data"), tmp_path, tell=lambda _: None)
    assert ("Eco" in variants(recipe)) == (reward["form"] != "plain")
    assert {run.grpo.reward.form for run, _ in trained} >= {
        "plain",
        "bounded" if reward["form"] == "paper" else "paper",
    }


def test_a_variant_without_room_stops_the_ablation_before_it_trains(trained: list[Any], tmp_path: Path) -> None:
    recipe = short_recipe(grpo={"reward": {"min_length": 0.2}})
    with pytest.raises(RecipeError, match=r"variant 'Eco' of smoke: grpo.reward: use min_length < beta"):
        ablate(recipe, Path("data"), tmp_path, tell=lambda _: None)
    assert not trained
    ablate(recipe, Path("data"), tmp_path, only=("full",), tell=lambda _: None)
    assert trained


def test_a_recipe_without_a_model_has_no_variants(trained: list[Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no model to train"):
        ablate(load_recipe(PATH.parent / "vltrain.yaml"), Path("data"), tmp_path, tell=lambda _: None)
    assert not trained


@pytest.mark.parametrize(("modalities", "alone"), [(["text"], set()), (["text", "image"], {"text", "image"})])
def test_modalities_alone_where_there_are_several(modalities: list[str], alone: set[str]) -> None:
    recipe = parse_recipe(merged(short_recipe().model_dump(mode="json"), {"data": {"modalities": modalities}}))
    names = {name for name in variants(recipe) if name.startswith("R-SFT (")}
    assert names == {f"R-SFT ({name})" for name in alone}
