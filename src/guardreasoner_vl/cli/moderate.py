"""The commands that judge one exchange, or every row of a file."""
# No `from __future__ import annotations`: typer reads the annotations.

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardreasoner_vl.choices import CHUNK
from guardreasoner_vl.cli.errors import BLOCK, ERROR, OK, say
from guardreasoner_vl.cli.groups import grouped, option_names
from guardreasoner_vl.cli.options import (
    POLICY_OPTIONS,
    ClusterOptions,
    EngineOptions,
    InputOptions,
    LabelOptions,
    VerdictOptions,
    check_policy_options,
    policy_of,
    refuse_options,
)
from guardreasoner_vl.cli.terminal import be_quiet, progress_bar, resumable, show
from guardreasoner_vl.errors import GuardError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from guardreasoner_vl.guard import Item, Moderator
    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.types import Exchange, Verdict

STDIN = "-"


@grouped
def moderate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The user's prompt; - reads stdin.")] = None,
    response: Annotated[str | None, typer.Option(metavar="TEXT", help="The model's response; - reads stdin.")] = None,
    image: Annotated[list[str] | None, typer.Option(metavar="FILE", help="An image file; repeatable.")] = None,
    messages: Annotated[
        str | None, typer.Option(metavar="FILE", help="OpenAI-style chat messages in a JSON file; - reads stdin.")
    ] = None,
    *,
    engine: EngineOptions,
    labels: LabelOptions,
    inputs: InputOptions,
    verdicts: VerdictOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as one line of JSON.")] = False,
) -> None:
    """Judge one exchange. Exit code 0: allow, 1: block, 2: it could not be judged."""
    if [prompt, response, messages].count(STDIN) > 1:
        raise InputError("only one option can be '-': standard input is read once")
    if messages is not None and (prompt is not None or response is not None or image):
        raise InputError("give --messages, or --prompt, --response and --image, not both")
    check_policy_options(context)
    be_quiet()
    from guardreasoner_vl.types import Exchange

    def build() -> Exchange:
        if messages is not None:
            return Exchange.from_messages(_read_messages(messages))
        return Exchange(_option_text(prompt), tuple(image or ()), _option_text(response))

    verdict = _verdict_or_error(build, policy_of(labels, inputs, verdicts), engine)
    _show_verdict(verdict, as_json, verdicts.show_reasoning)
    raise typer.Exit(ERROR if verdict.error else BLOCK if verdict.action == "block" else OK)


@grouped
def batch(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN.jsonl", help="Rows of the form {id, prompt, images, response} or {id, messages}, one a line."
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", help="The verdicts, one a line, each with its row's id.")
    ],
    *,
    engine: EngineOptions,
    cluster: ClusterOptions,
    labels: LabelOptions,
    inputs: InputOptions,
    verdicts: VerdictOptions,
    chunk: Annotated[
        int, typer.Option(min=1, metavar="N", help="The number of rows that are judged and saved together.")
    ] = CHUNK,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask a running service (`serve`), which has its own settings.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Requests in flight at once, with --url.")] = 64,
) -> None:
    """Judge every row of a JSONL file; if it stops, the same command resumes.

    Rows whose verdict is an error are judged again by the next run. Invalid lines are listed in OUT.rejected.jsonl.
    OUT.settings.json holds the settings: a run with others needs another OUT.
    Exit code 0: every line has a verdict, 2: some lines have an error or no verdict. With --url the service's key is
    read from GUARDREASONER_KEY.
    """
    if url:
        of_service = (*option_names(EngineOptions), *(name for name in POLICY_OPTIONS if name != "mode"))
        refuse_options(context, of_service, "has no effect with --url, whose service has its own setting: leave it out")
        of_cluster = option_names(ClusterOptions)
        refuse_options(context, of_cluster, "has no effect with --url, whose service judges the rows: leave it out")
    else:
        refuse_options(
            context,
            ("concurrency",),
            "has no effect without --url: give the URL of a running service, or leave it out",
        )
        check_policy_options(context)
    be_quiet()
    from guardreasoner_vl.batch.moderate import check_paths, rejected_path, run_batch
    from guardreasoner_vl.cli.render import summary_text

    check_paths(source, target)  # before a model is loaded, which takes seconds
    policy = policy_of(labels, inputs, verdicts)

    def opened() -> "AbstractContextManager[Moderator[Item]]":
        if url:
            from guardreasoner_vl.remote.served import ServedGuard

            return ServedGuard(url, labels.mode, max_concurrency=concurrency)
        return cluster.open_guard(engine, policy)

    with resumable(), opened() as guard, progress_bar() as progress:
        summary = run_batch(
            guard, source, target, chunk=chunk, show_reasoning=verdicts.show_reasoning, progress=progress
        )
    show(summary_text(summary, str(rejected_path(target))), stderr=True)
    raise typer.Exit(OK if summary.complete else ERROR)


def schema() -> None:
    """Print the JSON Schema of a verdict."""
    from guardreasoner_vl.types import Verdict

    typer.echo(json.dumps(Verdict.model_json_schema(), indent=2))


def _verdict_or_error(build: "Callable[[], Exchange]", policy: "Policy", engine: EngineOptions) -> "Verdict":
    """The verdict; an error becomes an error verdict. An invalid exchange is refused before a model is loaded."""
    from guardreasoner_vl.images.exchange import checked_exchange
    from guardreasoner_vl.judging.judge import error_verdict
    from guardreasoner_vl.types import ModelInfo

    try:
        exchange = build()
        checked_exchange(exchange, policy.images)
        with engine.open_guard(policy) as guard:
            return next(guard.moderate_batch([exchange]))
    except GuardError as error:
        return error_verdict(error, policy, ModelInfo(name=engine.model or "embedded"))


def _option_text(option: str | None) -> str | None:
    """An option's text; for `-` standard input without its last line end, as in a shell's `$(...)`."""
    if option != STDIN:
        return option
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError("standard input is not UTF-8: convert it") from error


def _read_messages(name: str) -> Any:
    """The list of messages in a JSON file, or in its field `messages` as in a request's body."""
    source = "standard input" if name == STDIN else name
    try:
        content = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
        messages = json.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}); give a JSON file of chat messages") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not JSON; give a list of chat messages") from error
    return messages["messages"] if isinstance(messages, dict) and "messages" in messages else messages


def _show_verdict(verdict: "Verdict", as_json: bool, show_reasoning: bool) -> None:
    from guardreasoner_vl.batch.output import verdict_json
    from guardreasoner_vl.cli.render import verdict_text

    if as_json:
        typer.echo(verdict_json(verdict, show_reasoning))
    if verdict.error:
        say(f"{verdict.error.message} ({verdict.error.code}, {verdict.action})")
    elif not as_json:
        show(verdict_text(verdict, show_reasoning))


COMMANDS = (moderate, batch, schema)
