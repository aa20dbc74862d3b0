"""The commands that make and describe corpora.

Exit codes of `curate`, `synthesize` and `corpus check`: 0 all rows done, 1 rows were skipped or remain, 2 error.
"""
# No `from __future__ import annotations`: typer reads the annotations. Whatever else a command needs is
# imported inside it, so that --help stays instant.

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guardreasoner_vl.choices import ExportLayout, TeacherName
from guardreasoner_vl.cli.errors import OneLineErrors, note, say_skipped
from guardreasoner_vl.cli.options import read_recipe, refuse_options
from guardreasoner_vl.cli.terminal import command_line, progress_bar, resumable

if TYPE_CHECKING:
    from guardreasoner_vl.corpus.progress import SynthesisProgress
    from guardreasoner_vl.stages.synthesize import SynthesisReport

_LIVE = ("base_url", "concurrency", "requests_per_minute", "tokens_per_minute", "max_cost", "max_tokens")
_ENDPOINT = ("model", *(name for name in _LIVE if name != "concurrency"), "price", "batch_out", "batch_in")
"""Parameters of `synthesize` that matter only while an endpoint is asked (`_LIVE`), or only with an endpoint."""

INCOMPLETE = 1
"""Exit code of a job that is done, but not with every row."""

corpus = typer.Typer(cls=OneLineErrors, no_args_is_help=True, help="Describe, check and convert corpora.")
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `curate --out` wrote.")]


def curate(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE", help="A YAML recipe whose `data` section names sources, or the name of a shipped one."
        ),
    ],
    data: Annotated[Path, typer.Option(metavar="DIR", help="The folder that holds the recipe's sources.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the corpus.")],
    embed: Annotated[bool, typer.Option("--embed", help="Store the images' bytes in the rows.")] = False,
) -> None:
    """Build a corpus from a recipe's sources: mixed, deduplicated, with a card. Exit code 1: rows were skipped."""
    from guardreasoner_vl.stages import curate as stage

    with progress_bar() as progress:
        report = stage.run(read_recipe(recipe), data, out, embed=embed, progress=progress)
    say_skipped(report.skipped)
    typer.echo(f"{report.info.rows:,} of {report.read + report.derived:,} rows")
    stats(out)
    raise typer.Exit(INCOMPLETE if report.skipped.total else 0)


def synthesize(
    context: typer.Context,
    folder: FolderArgument,
    teacher: Annotated[TeacherName, typer.Option("--teacher", help="Offline rules, or an OpenAI-compatible endpoint.")],
    model: Annotated[str, typer.Option(metavar="NAME", help="The model at the endpoint.")] = "gpt-4o-2024-08-06",
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url", metavar="URL", help="The endpoint, by default OpenAI's; the key is read from OPENAI_API_KEY."
        ),
    ] = None,
    attempts: Annotated[
        int, typer.Option(min=1, help="At most this many answers for a row until one passes the quality gates.")
    ] = 3,
    votes: Annotated[int, typer.Option(min=1, help="Answers that label a row without labels, by majority.")] = 3,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at once.")] = 64,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="The endpoint's limit of requests per minute.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="The endpoint's limit of tokens per minute.")
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(min=0, metavar="USD", help="Stop before more than this is spent, earlier runs included."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=0, help="Stop before more tokens than this are used, earlier runs included.")
    ] = None,
    price: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="IN OUT", help="Price in USD of a million input tokens and of a million output tokens."),
    ] = None,
    batch_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write requests for the Batch API to FILE; ask no endpoint.")
    ] = None,
    batch_in: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Read results of the Batch API from FILE; repeatable.")
    ] = None,
) -> None:
    """Let a teacher write a corpus's reasoning; a stopped run resumes. Exit code 1: rows without reasoning remain."""
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
        written = batch.write_batch_requests(folder, batch_out, Chat(model), attempts=attempts, votes=votes)
        say_skipped(written.skipped)
        typer.echo(f"{written.requests:,} requests in {', '.join(map(str, written.files))}")
        return
    if batch_in:
        returned = batch.read_results(folder, batch_in, model, attempts=attempts, votes=votes, price=known)
        say_skipped(returned.ignored)
        _finish(returned.progress, f"{returned.answers:,} answers")
    opened = open_teacher(teacher, model, base_url, requests_per_minute, tokens_per_minute)
    budget = Budget(max_cost, max_tokens)
    with resumable(), progress_bar() as progress:
        report = stage.run(
            folder,
            opened,
            attempts=attempts,
            votes=votes,
            concurrency=concurrency,
            budget=budget,
            price=known,
            progress=lambda now: progress(now.done, now.total),
        )
    if report.stopped_by:
        note(f"stopped by {report.stopped_by}; run the same command to resume")
    cost = "" if report.cost is None else f", {report.cost:.2f} USD"
    _finish(report, f"{report.attempts:,} answers, {report.tokens:,} tokens{cost}")


@corpus.command()
def stats(folder: FolderArgument) -> None:
    """Write the corpus's card: steps compared with the paper's Table 6, labels, categories, lengths, with figures."""
    from guardreasoner_vl.corpus.card import write_card
    from guardreasoner_vl.corpus.stats import stats_of
    from guardreasoner_vl.corpus.store import read_corpus

    typer.echo(str(write_card(folder, stats_of(read_corpus(folder)), command_line())))


@corpus.command()
def export(
    folder: FolderArgument,
    layout: Annotated[
        ExportLayout,
        typer.Option("--layout", help="guardreasoner: the authors' three JSON files; sharegpt: one for LLaMA-Factory."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not exist.")],
) -> None:
    """Write the corpus for other programs, with its images; both layouts can be read back without loss."""
    from guardreasoner_vl.corpus.export import export as write
    from guardreasoner_vl.corpus.store import read_info

    total = read_info(folder).rows
    with progress_bar() as progress:
        count = write(folder, layout, out, lambda done: progress(done, total))
    typer.echo(f"{count:,} rows in {out}")


@corpus.command()
def check(folder: FolderArgument) -> None:
    """Check ids, labels, images and reasoning of every row. Exit code 1: faults were found."""
    from guardreasoner_vl.corpus.check import check_corpus

    with progress_bar() as progress:
        rows, faults = check_corpus(folder, progress)
    for name, reason in faults.rows:
        typer.echo(f"{name}: {reason}")
    typer.echo(f"{rows:,} rows, {faults.total:,} faults")
    raise typer.Exit(INCOMPLETE if faults.total else 0)


@corpus.command("import")
def import_(
    rows: Annotated[Path, typer.Argument(metavar="FILE", help="Rows {prompt, label}: JSON lines, JSON, CSV, Parquet.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The source folder to write; it must not exist.")],
    source: Annotated[str, typer.Option(metavar="NAME", help="Name of the rows in reports.")] = "own",
) -> None:
    """Convert a file of labelled rows to a source folder that recipes can name. Exit code 1: rows were skipped."""
    from guardreasoner_vl.sources.plain_rows import import_rows

    report = import_rows(rows, out, source)
    for place, reason in report.skipped.rows:
        note(f"{place}: {reason}")
    for (request, response), count in sorted(report.labels.items(), key=str):
        typer.echo(f"{count:,} rows: request {request or 'not labelled'}, response {response or 'not labelled'}")
    typer.echo(f"{report.rows:,} rows in {out}, {report.skipped.total:,} skipped")
    raise typer.Exit(INCOMPLETE if report.skipped.total else 0)


COMMANDS = (curate, synthesize)


def _finish(state: "SynthesisProgress | SynthesisReport", spent: str) -> None:
    """Print the counts of the corpus, and exit with 1 if rows have no reasoning."""
    say_skipped(state.skipped)
    for reason, count in state.faults.reasons.items():
        note(f"no answer: {count:,} rows ({reason}); run the same command to ask again")
    if state.of_others:
        note(f"{state.of_others:,} rows keep another teacher's reasoning; curate into a new --out to ask this one")
    typer.echo(f"{state.kept:,} of {state.rows:,} rows have reasoning, {state.remaining:,} remain; {spent}")
    raise typer.Exit(INCOMPLETE if state.kept < state.rows else 0)
