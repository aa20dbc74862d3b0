"""The commands that train guards: each stage alone, and all of them in sequence.

`run` keeps the output of all stages in one folder; the commands of single stages take folders as options. All of them
resume where they stopped.
"""
# No `from __future__ import annotations`: typer reads the annotations. Whatever else a command needs is
# imported inside it, so that --help stays instant.

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from guardreasoner_vl.cli.groups import grouped
from guardreasoner_vl.cli.options import ClusterOptions, EngineOptions, read_recipe, refuse_options
from guardreasoner_vl.cli.terminal import progress_bar, resumable, show
from guardreasoner_vl.errors import InputError, RecipeError

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML recipe, or the name of a shipped one, such as smoke.")
]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="The folder of the run; a stopped run resumes there.")]
DataOption = Annotated[
    Path, typer.Option(metavar="DIR", help="The folder that holds the recipe's sources, or a corpus (`curate`).")
]


def sft(recipe: RecipeArgument, data: DataOption, out: OutOption) -> None:
    """Train a guard by supervised fine-tuning on reasoning (R-SFT), and print the finished model's folder."""
    from guardreasoner_vl.stages import sft as stage

    settings = read_recipe(recipe)
    if sys.stderr.isatty():  # the trainer shows a bar of its own, with the loss
        finished = stage.run(settings, data, out, progress=None)
    else:
        with progress_bar() as progress:
            finished = stage.run(settings, data, out, progress=progress)
    _report_rows(out / "sft" / "data.json")
    typer.echo(str(finished))


@grouped
def mine(
    recipe: RecipeArgument,
    data: Annotated[Path, typer.Option(metavar="DIR", help="A corpus (`curate`).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the hard rows, itself a corpus.")],
    engine: EngineOptions,
    cluster: ClusterOptions,
) -> None:
    """Mine hard rows: let a guard answer every row several times, and keep the rows that it gets wrong."""
    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.stages import mine as stage

    settings = read_recipe(recipe)
    policy = Policy(folder_calibration=False)
    with resumable(), cluster.open_guard(engine, policy) as guard, progress_bar() as progress:
        report = stage.run(settings, data, guard, out, progress=progress)
    typer.echo(f"{report.kept:,} of {report.judged:,} rows are hard ({settings.mine.keep}); {out}")


def augment(
    recipe: RecipeArgument,
    data: Annotated[Path, typer.Option(metavar="DIR", help="The hard rows (`mine`).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the RL set, itself a corpus.")],
) -> None:
    """Add joined pairs to the hard rows: two texts become one, two images one, labels follow the union rule."""
    from guardreasoner_vl.stages import augment as stage

    with progress_bar() as progress:
        report = stage.run(read_recipe(recipe), data, out, progress=progress)
    typer.echo(f"{report.hard:,} hard rows and {report.augmented:,} joined ones; {out}")


def grpo(
    recipe: RecipeArgument,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="The start model: a folder (from `sft`), 'embedded' or a hub id.")
    ],
    data: Annotated[Path, typer.Option(metavar="DIR", help="The RL set (`augment`), or any other corpus.")],
    out: OutOption,
    validation: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A corpus whose validation rows choose the best checkpoint.")
    ] = None,
    verify_parity: Annotated[
        bool,
        typer.Option("--verify-parity", help="First compare log-probabilities, loss and gradients with stock TRL."),
    ] = False,
) -> None:
    """Train a guard by online RL (GRPO), and print the finished model's folder."""
    from guardreasoner_vl.corpus.store import read_split
    from guardreasoner_vl.engines.model_files import resolve_folder
    from guardreasoner_vl.stages import grpo as stage

    settings = read_recipe(recipe)
    if validation and settings.grpo.evaluate_every is None:
        raise InputError(
            "--validation needs grpo.evaluate_every: set in the recipe after how many rollout batches to validate"
        )
    start = resolve_folder(model)
    rows = list(read_split(validation, "validation")) if validation else []
    if verify_parity:
        from guardreasoner_vl.training.grpo.trl_parity import verify

        typer.echo(verify(settings, start, data).summary(), err=True)
    with resumable(), progress_bar() as progress:
        finished = stage.run(settings, start, data, out, rows, lambda now: progress(now.step, now.total))
    typer.echo(str(finished))


def run(
    context: typer.Context,
    recipe: RecipeArgument,
    out: OutOption,
    data: Annotated[Path, typer.Option(metavar="DIR", help="The folder that holds the recipe's sources.")] = Path(),
    stages: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Run only these stages, in the method's order.")
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print steps, memory and commands of the run, without running it; fails if a stage does not fit.",
        ),
    ] = False,
    gpus: Annotated[int, typer.Option(min=0, metavar="N", help="The number of GPUs to plan for, with --plan.")] = 0,
    gpu_memory: Annotated[
        int, typer.Option(min=1, metavar="GB", help="The memory of each GPU to plan for, with --plan and --gpus.")
    ] = 80,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="GPU",
            help="Compute hours for GPUs of this kind, with --plan: a name such as h100, or bf16 TFLOP/s, GB/s and GB.",
        ),
    ] = None,
) -> None:
    """Run the whole method: curate, synthesize, sft, mine, augment, grpo, evaluate. Finished stages are skipped."""
    from guardreasoner_vl.pipeline import run as pipeline

    if not plan:
        refuse_options(
            context,
            ("gpus", "gpu_memory", "gpu"),
            "has no effect without --plan, which plans for these GPUs: give --plan too",
        )
    elif not gpus:
        refuse_options(context, ("gpu_memory",), "has no effect without --gpus, whose memory it is: give --gpus too")
    settings = read_recipe(recipe)
    chosen = pipeline.STAGES if stages is None else tuple(name.strip() for name in stages.split(","))
    if unknown := [name for name in chosen if name not in pipeline.STAGES]:
        raise RecipeError(f"unknown stage {unknown[0]!r}: use {', '.join(pipeline.STAGES)}")
    if plan:
        from guardreasoner_vl.pipeline.plan import DOES_NOT_FIT, plan_of

        text = plan_of(settings, recipe, data, out, chosen, gpus, gpu_memory, gpu)
        typer.echo(text)
        if DOES_NOT_FIT in text:
            raise typer.Exit(1)
        return
    with resumable(), progress_bar() as progress:
        pipeline.run(pipeline.Run(settings, data, out, lambda line: typer.echo(line, err=True), progress), chosen)
    typer.echo(str(out))


def ablate(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the variants; a stopped run resumes there.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="The folder that holds the recipe's sources.")] = Path(),
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs of each variant, each with a different seed.")
    ] = 1,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Run only this variant; repeatable.")] = None,
) -> None:
    """Train and evaluate variants of a recipe without a part of the method; write a table and a figure."""
    from guardreasoner_vl.pipeline import ablation

    with resumable(), progress_bar() as progress:
        path = ablation.ablate(
            read_recipe(recipe), data, out, seeds, only or (), lambda line: typer.echo(line, err=True), progress
        )
    typer.echo(path.read_text("utf-8"))


def compact(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Qwen2.5-VL folder, 'embedded' or a hub id.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the copy; it must be new or empty.")],
    expand: Annotated[
        bool, typer.Option("--expand", help="The inverse: bf16 weights, which vLLM and other tools can read.")
    ] = False,
) -> None:
    """Copy a model with int8 matrices, about half the size; every command of this package reads both forms."""
    from guardreasoner_vl.engines.model_files import resolve_folder
    from guardreasoner_vl.training import compact as stage

    report = (stage.expand if expand else stage.compact)(resolve_folder(model), out)
    error = "" if expand else f", relative error {report.error:.2%}"
    typer.echo(f"{report.before / 1e6:,.2f} MB of weights became {report.after / 1e6:,.2f} MB{error}; {out}")


def average(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="A Qwen2.5-VL folder or hub id, before a training.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="The same model after the training.")],
    share: Annotated[float, typer.Option(metavar="A", help="Share of AFTER, from 0 to 1.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The averaged model's folder; it must be new or empty.")],
) -> None:
    """Average a model's weights before and after a training, so that it forgets less (WiSE-FT, arXiv 2109.01903)."""
    from guardreasoner_vl.engines.model_files import resolve_folder
    from guardreasoner_vl.training import averaging

    averaging.average(resolve_folder(before), resolve_folder(after), share, out)
    typer.echo(str(out))


COMMANDS = (sft, mine, augment, grpo, run, ablate, compact, average)


def _report_rows(path: Path) -> None:
    """Print how many rows were trained on, and how many were skipped by reason."""
    from guardreasoner_vl.cli.render import counts_text

    if not path.is_file():
        return
    report = json.loads(path.read_text("utf-8"))
    show(counts_text("trained on", {"rows": report["rows"], "tokens": report["tokens"]}), stderr=True)
    if report["skipped"]:
        show(counts_text("skipped", report["skipped"]), stderr=True)
