"""The commands for a pretrained language model: build the start of a training, and let it write harmless requests."""
# No `from __future__ import annotations`: typer reads the annotations.

from pathlib import Path
from typing import Annotated

import typer

from guardreasoner_vl.cli.options import read_recipe
from guardreasoner_vl.cli.terminal import progress_bar, resumable
from guardreasoner_vl.errors import RecipeError

LanguageModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A GGUF file, an archive that holds one, a model folder or a hub id.")
]


def base(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML recipe with `model.base`, or the name of a shipped one.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The model folder to write; it must not exist.")],
) -> None:
    """Build the Qwen2.5-VL folder that training starts from, using the recipe's pretrained language model."""
    from guardreasoner_vl.training.model_folder import emptied, move, written
    from guardreasoner_vl.training.pretrained_base import write_pretrained

    settings = read_recipe(recipe)
    if settings.base.base is None:
        raise RecipeError(
            f"{recipe}: model.base is not set: give a recipe that has it; other recipes do not need this command"
        )
    if out.exists():
        raise RecipeError(f"{out} exists already: give the name of a new folder")
    with written(out, resumes="from the start"):
        partial = emptied(out)
        write_pretrained(partial, settings.base.base, settings.seed)
        move(partial, out)
    typer.echo(str(out))


def write_requests(
    model: LanguageModelArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the rows; a stopped run resumes there.")],
    count: Annotated[int, typer.Option(min=1, metavar="N", help="The number of requests.")] = 20_000,
    answered: Annotated[
        float, typer.Option(min=0, max=1, metavar="0..1", help="The share of requests that get an answer.")
    ] = 0.25,
    seed: Annotated[int, typer.Option(metavar="N", help="The seed of the sampling.")] = 0,
) -> None:
    """Let a chat model write requests that people might send, and answers to some: harmless rows for `curate`."""
    from guardreasoner_vl.cli.render import counts_text
    from guardreasoner_vl.cli.terminal import show
    from guardreasoner_vl.engines.weights import computing_dtype
    from guardreasoner_vl.stages import write_requests as stage
    from guardreasoner_vl.training.pretrained_base import load_language_model

    with resumable(), progress_bar() as progress:
        source = load_language_model(model, dtype=computing_dtype())
        counts = stage.run(
            source, model, stage.RequestSettings(count=count, seed=seed, answered=answered), out, progress
        )
    show(counts_text("requests", counts), stderr=True)
    typer.echo(str(out))
