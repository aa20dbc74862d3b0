"""The command `guardreasoner-vl`.

Exit codes: 0 allow, or all done; 1 block; 2 error, even if the policy allows what could not be judged; 130 interrupted.
"""
# No `from __future__ import annotations`: typer reads the annotations. Whatever else a command needs is
# imported inside it, so that --help stays instant.

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Literal

import typer

from guardreasoner_vl.cli import base, capacity, corpus, evaluation, moderate, publish, serve, training
from guardreasoner_vl.cli.errors import OneLineErrors
from guardreasoner_vl.cli.terminal import PACKAGE, hide_bars, log_to_stderr
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.version import __version__

app = typer.Typer(
    cls=OneLineErrors,
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Judge": moderate.COMMANDS,
    "Serve": (*serve.COMMANDS, *capacity.COMMANDS),
    "Data": (*corpus.COMMANDS, base.write_requests),
    "Train": (base.base, *training.COMMANDS),
    "Measure": evaluation.COMMANDS,
    "Publish": publish.COMMANDS,
}
"""The panels of --help with their commands, in the order shown."""

for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
app.add_typer(corpus.corpus, name="corpus", rich_help_panel="Data")


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    hide_bars()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger(PACKAGE).addHandler(logging.NullHandler())
    try:
        app(prog_name="guardreasoner-vl")
    except KeyboardInterrupt:
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"guardreasoner-vl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option(
            "--log-level",
            help="Print log records from this level up on stderr, as JSON lines without content; none by default.",
        ),
    ] = None,
) -> None:
    """A guard for vision-language models: it reasons first, then labels the request and the response.

    Exit codes: 0 allow or done, 1 block, 2 error, 130 interrupted.
    """
    if log_level is None:
        return
    if context.invoked_subcommand == serve.serve.__name__:
        raise InputError("--log-level has no effect with serve, whose configuration has its own: set log_level there")
    context.call_on_close(log_to_stderr(log_level))
