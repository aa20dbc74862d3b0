"""The commands that make and describe corpora.

Exit codes of `curate`, `synthesize` and `corpus check`: 0 all done, 1 something was set aside or is left, 2 error.
"""
# No `from __future__ import annotations`: typer reads the annotations. Whatever else a command needs is
# imported inside it, so that --help stays instant.

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from guardreasoner_vl.cli.errors import OneLineErrors, note, say_set_aside
from guardreasoner_vl.cli.options import command_line, progress_bar, refuse_options, resumable

if TYPE_CHECKING:
    from guardreasoner_vl.corpus.progress import Standing
    from guardreasoner_vl.stages.synthesize import Synthesis

_LIVE = ("base_url", "concurrency", "requests_per_minute", "tokens_per_minute", "max_cost", "max_tokens")
_ENDPOINT = ("model", *(name for name in _LIVE if name != "concurrency"), "price", "batch_out", "batch_in")
"""Parameters of `synthesize` that mean something only while an endpoint is asked, or only with one."""

SET_ASIDE = 1
"""Exit code of a job that is done, but not with every row."""

corpus = typer.Typer(cls=OneLineErrors, no_args_is_help=True, help="Describe, check and convert corpora.")
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `curate --out` wrote.")]


def curate(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Its `data` section names sources and shares.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Where the sources lie.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The corpus's folder.")],
    embed: Annotated[bool, typer.Option("--embed", help="Put the images' bytes into the rows.")] = False,
) -> None:
    """Make a corpus of a recipe's sources: mixed, without duplicates, with a card. Exit code 1: rows were set aside."""
    from guardreasoner_vl.recipe import load_recipe
    from guardreasoner_vl.stages import curate as stage

    with progress_bar() as progress:
        made = stage.run(load_recipe(recipe), data, out, embed=embed, progress=progress)
    say_set_aside(made.set_aside)
    typer.echo(f"{made.info.rows:,} of {made.read + made.made:,} rows")
    stats(out)
    raise typer.Exit(SET_ASIDE if made.set_aside.total else 0)


def synthesize(
    context: typer.Context,
    folder: FolderArgument,
    teacher: Annotated[
        Literal["rules", "openai"], typer.Option("--teacher", help="Offline rules, or an OpenAI-compatible endpoint.")
    ],
    model: Annotated[str, typer.Option(metavar="NAME", help="The endpoint's model.")] = "gpt-4o-2024-08-06",
    base_url: Annotated[
        str | None,
        typer.Option("--base-url", metavar="URL", help="The endpoint, OpenAI's if not given; the key: OPENAI_API_KEY."),
    ] = None,
    attempts: Annotated[int, typer.Option(min=1, help="Answers asked for until one passes the quality gates.")] = 3,
    votes: Annotated[int, typer.Option(min=1, help="Answers that label a row without labels, by majority.")] = 3,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="The endpoint's limit.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="The endpoint's limit.")] = None,
    max_cost: Annotated[float | None, typer.Option(min=0, metavar="USD", help="Stop before this is spent.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=0, help="Stop before these are used, in all.")] = None,
    price: Annotated[
        tuple[float, float] | None, typer.Option(metavar="IN OUT", help="USD for a million tokens, in and out.")
    ] = None,
    batch_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the Batch API's requests there instead of asking.")
    ] = None,
    batch_in: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Take in the Batch API's results; may be given often.")
    ] = None,
) -> None:
    """Have a teacher write the reasoning of a corpus; one that stopped goes on. Exit code 1: not every row has one."""
    from guardreasoner_vl.corpus import batch_synthesis as batch
    from guardreasoner_vl.stages import synthesize as stage
    from guardreasoner_vl.teachers.budget import Budget, Price
    from guardreasoner_vl.teachers.choose import open_teacher
    from guardreasoner_vl.teachers.openai import Chat

    known = Price(*price) if price else None
    if teacher == "rules":
        refuse_options(
            context, _ENDPOINT, "has no effect with --teacher rules, which asks no endpoint: give --teacher openai"
        )
    elif batch_out:
        unused = (*_LIVE, "price", "batch_in")
        refuse_options(context, unused, "has no effect with --batch-out, which only writes requests: leave it out")
    elif batch_in:
        refuse_options(context, _LIVE, "has no effect with --batch-in, which only reads results: leave it out")
    if batch_out:
        written = batch.write_requests(folder, batch_out, Chat(model), attempts=attempts, votes=votes)
        say_set_aside(written.skipped)
        typer.echo(f"{written.requests:,} requests in {', '.join(map(str, written.files))}")
        return
    if batch_in:
        returned = batch.read_results(folder, batch_in, model, attempts=attempts, votes=votes, price=known)
        say_set_aside(returned.ignored)
        _finish(returned.standing, f"{returned.answers:,} answers")
    opened = open_teacher(teacher, model, base_url, requests_per_minute, tokens_per_minute)
    budget = Budget(max_cost, max_tokens)
    with resumable(), progress_bar() as progress:
        found = stage.run(
            folder,
            opened,
            attempts=attempts,
            votes=votes,
            concurrency=concurrency,
            budget=budget,
            price=known,
            progress=(lambda now: progress(now.done, now.total)) if progress else None,
        )
    if found.stopped_by:
        note(f"stopped by {found.stopped_by}; run the same command to go on")
    cost = "" if found.cost is None else f", {found.cost:.2f} USD"
    _finish(found, f"{found.attempts:,} answers, {found.tokens:,} tokens{cost}")


@corpus.command()
def stats(folder: FolderArgument) -> None:
    """Write the corpus's card: steps beside the paper's Table 6, labels, categories, lengths, with figures."""
    from guardreasoner_vl.corpus.card import write_card
    from guardreasoner_vl.corpus.stats import stats_of
    from guardreasoner_vl.corpus.store import read_corpus

    typer.echo(str(write_card(folder, stats_of(read_corpus(folder)), command_line())))


@corpus.command()
def export(
    folder: FolderArgument,
    layout: Annotated[
        Literal["guardreasoner", "sharegpt"],
        typer.Option("--layout", help="The authors' three JSON files, or one for LLaMA-Factory."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
) -> None:
    """Write the corpus for other programs, images included; both layouts are read back without loss."""
    from guardreasoner_vl.corpus.export import export as write
    from guardreasoner_vl.corpus.store import read_info

    total = read_info(folder).rows
    with progress_bar() as progress:
        count = write(folder, layout, out, (lambda done: progress(done, total)) if progress else None)
    typer.echo(f"{count:,} rows in {out}")


@corpus.command()
def check(folder: FolderArgument) -> None:
    """Check ids, labels, images and reasoning of every row. Exit code 1: there are faults."""
    from guardreasoner_vl.corpus.check import check_corpus

    with progress_bar() as progress:
        rows, faults = check_corpus(folder, progress)
    for name, reason in faults.rows:
        typer.echo(f"{name}: {reason}")
    typer.echo(f"{rows:,} rows, {faults.total:,} faults")
    raise typer.Exit(SET_ASIDE if faults.total else 0)


COMMANDS = (curate, synthesize)


def _finish(found: "Standing | Synthesis", spent: str) -> None:
    """Say where the corpus stands, and end with the exit code that says whether that is the end."""
    say_set_aside(found.set_aside)
    for reason, count in found.faults.reasons.items():
        note(f"no answer: {count:,} rows ({reason}); run the same command to ask again")
    typer.echo(f"{found.kept:,} of {found.rows:,} rows have reasoning, {found.left:,} are left; {spent}")
    raise typer.Exit(SET_ASIDE if found.kept < found.rows else 0)
