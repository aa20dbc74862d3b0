"""The commands that train guards: each stage for itself, and all of them in a row.

What `run` keeps in one folder the single stages are pointed at by options; all of them go on where they stopped.
"""
# No `from __future__ import annotations`: typer reads the annotations. Whatever else a command needs is
# imported inside it, so that --help stays instant.

import json
from pathlib import Path
from typing import Annotated

import typer

from guardreasoner_vl.cli.options import (
    EngineOption,
    ModelOption,
    UrlOption,
    progress_bar,
    refuse_options,
    resumable,
    show,
)
from guardreasoner_vl.errors import InputError, RecipeError

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe, such as recipes/smoke.yaml.")]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="The run's folder; a run that stopped goes on there.")]
DataOption = Annotated[
    Path, typer.Option(metavar="DIR", help="The folder that holds the recipe's sources, or a corpus (`curate`).")
]


def sft(recipe: RecipeArgument, data: DataOption, out: OutOption) -> None:
    """Train a guard by supervised fine-tuning on reasoning, and print the finished model's folder."""
    from guardreasoner_vl.recipe import load_recipe
    from guardreasoner_vl.stages import sft as stage

    finished = stage.run(load_recipe(recipe), data, out)
    _report_rows(out / "sft" / "data.json")
    typer.echo(str(finished))


def mine(
    recipe: RecipeArgument,
    data: Annotated[Path, typer.Option(metavar="DIR", help="The corpus (`curate`).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the hard rows, which are a corpus too.")],
    model: ModelOption = None,
    engine: EngineOption = "auto",
    base_url: UrlOption = None,
) -> None:
    """Ask a guard several times about every row and keep those that it gets wrong."""
    from guardreasoner_vl.cli.options import open_guard
    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.recipe import load_recipe
    from guardreasoner_vl.stages import mine as stage

    made = load_recipe(recipe)
    with (
        resumable(),
        open_guard(Policy(folder_calibration=False), model, engine, base_url) as guard,
        progress_bar() as progress,
    ):
        found = stage.run(made, data, guard.engine, out, progress=progress)
    typer.echo(f"{found.kept:,} of {found.judged:,} rows are hard ({made.mine.keep}); {out}")


def augment(
    recipe: RecipeArgument,
    data: Annotated[Path, typer.Option(metavar="DIR", help="The hard rows (`mine`).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the RL set, which is a corpus too.")],
) -> None:
    """Join pairs of hard rows: texts into one, images into one, labels by the union rule."""
    from guardreasoner_vl.recipe import load_recipe
    from guardreasoner_vl.stages import augment as stage

    with progress_bar() as progress:
        made = stage.run(load_recipe(recipe), data, out, progress=progress)
    typer.echo(f"{made.hard:,} hard rows and {made.augmented:,} joined ones; {out}")


def grpo(
    recipe: RecipeArgument,
    model: Annotated[str, typer.Option(help="Where to start: a folder (of `sft`), 'embedded' or a hub id.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="The RL set (`augment`), or any other corpus.")],
    out: OutOption,
    validation: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A corpus whose validation rows choose the best checkpoint.")
    ] = None,
    verify_parity: Annotated[
        bool,
        typer.Option("--verify-parity", help="Hold log-probabilities, loss and gradients against stock TRL first."),
    ] = False,
) -> None:
    """Train a guard by online RL, and print the finished model's folder."""
    from guardreasoner_vl.corpus.store import read_split
    from guardreasoner_vl.engines.model_files import resolve_folder
    from guardreasoner_vl.recipe import load_recipe
    from guardreasoner_vl.stages import grpo as stage

    settings = load_recipe(recipe)
    if validation and settings.grpo.evaluate_every is None:
        raise InputError(
            "--validation needs grpo.evaluate_every in the recipe, which says how often its rows are judged"
        )
    start = resolve_folder(model)
    rows = list(read_split(validation, "validation")) if validation else []
    if verify_parity:
        from guardreasoner_vl.training.grpo.trl_parity import verify

        typer.echo(verify(settings, start, data).told(), err=True)
    with resumable(), progress_bar() as progress:
        finished = stage.run(
            settings, start, data, out, rows, (lambda now: progress(now.step, now.total)) if progress else None
        )
    typer.echo(str(finished))


def run(
    context: typer.Context,
    recipe: RecipeArgument,
    out: OutOption,
    data: Annotated[Path, typer.Option(metavar="DIR", help="The folder that holds the recipe's sources.")] = Path(),
    stages: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Only these stages, in the method's order.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be done and what it takes, and stop.")] = False,
    gpus: Annotated[int, typer.Option(min=0, metavar="N", help="GPUs that the plan is made for.")] = 0,
) -> None:
    """Do the whole method: curate, synthesize, sft, mine, augment, grpo, evaluate. What is done already is skipped."""
    from guardreasoner_vl.pipeline import run as pipeline
    from guardreasoner_vl.recipe import load_recipe

    if not plan:
        refuse_options(
            context,
            ("gpus",),
            "has no effect without --plan, which prints the commands for that many GPUs: give --plan too",
        )
    made = load_recipe(recipe)
    chosen = pipeline.STAGES if stages is None else tuple(name.strip() for name in stages.split(","))
    if unknown := [name for name in chosen if name not in pipeline.STAGES]:
        raise RecipeError(f"unknown stage {unknown[0]!r}: use {', '.join(pipeline.STAGES)}")
    if plan:
        from guardreasoner_vl.pipeline.plan import plan_of

        typer.echo(plan_of(made, recipe, data, out, chosen, gpus))
        return
    with resumable(), progress_bar() as progress:
        pipeline.run(pipeline.Run(made, data, out, lambda line: typer.echo(line, err=True), progress), chosen)
    typer.echo(str(out))


def ablate(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The variants' folder; one that stopped goes on there.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="The folder that holds the recipe's sources.")] = Path(),
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each variant, with seeds of their own.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="This variant alone; may be given often.")
    ] = None,
) -> None:
    """Train and evaluate variants of a recipe that lack a part of the method; write the table and the figure."""
    from guardreasoner_vl.pipeline import ablation
    from guardreasoner_vl.recipe import load_recipe

    with resumable(), progress_bar() as progress:
        path = ablation.ablate(
            load_recipe(recipe), data, out, seeds, only or (), lambda line: typer.echo(line, err=True), progress
        )
    typer.echo(path.read_text("utf-8"))


def compact(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Qwen2.5-VL folder, 'embedded' or a hub id.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The copy's folder, a new one.")],
    expand: Annotated[
        bool, typer.Option("--expand", help="The way back: bf16 weights, which vLLM and other tools can read.")
    ] = False,
) -> None:
    """Copy a model with its matrices as int8, about half the size; every command here reads it like the original."""
    from guardreasoner_vl.engines.model_files import resolve_folder
    from guardreasoner_vl.training import compact as stage

    made = (stage.expand if expand else stage.compact)(resolve_folder(model), out)
    error = "" if expand else f", relative error {made.error:.2%}"
    typer.echo(f"{made.before / 1e6:,.2f} MB of weights became {made.after / 1e6:,.2f} MB{error}; {out}")


COMMANDS = (sft, mine, augment, grpo, run, ablate, compact)


def _report_rows(path: Path) -> None:
    """How many rows the training took and which it set aside."""
    from guardreasoner_vl.cli.render import counts_text

    if not path.is_file():
        return
    report = json.loads(path.read_text("utf-8"))
    show(counts_text("trained on", {"rows": report["rows"], "tokens": report["tokens"]}), stderr=True)
    if report["set_aside"]:
        show(counts_text("set aside", report["set_aside"]), stderr=True)
