"""Errors of commands: one line on stderr and exit code 2 for every failure."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from guardreasoner_vl.errors import GuardError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.sources.skipped import SkippedRows

OK, BLOCK, ERROR = 0, 1, 2
_SHOWN = 3


class OneLineErrors(TyperGroup):
    """Prints every failure as one line on stderr; never a traceback, which could show what was judged."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: ARG002
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and exit the process with its exit code; `standalone_mode` is ignored."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            sys.stdout.flush()
        except GuardError as error:
            code = say(str(error))
        except SystemExit as stopped:  # typer exits with 0 after a shell completion, with 1 if a pipe was closed
            code = _closed_pipe() if stopped.code else OK
        except BrokenPipeError:
            code = _closed_pipe()
        except OSError as error:
            code = say(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
        except Exception as error:
            code = _usage_fault(error) if hasattr(error, "format_message") else _unforeseen(error)
        sys.exit(code or OK)


def say(message: str) -> int:
    """Print one line on stderr; returns the exit code of an error."""
    from guardreasoner_vl.cli.render import one_line

    typer.secho(f"error: {one_line(message)}", fg=typer.colors.RED, err=True)
    return ERROR


def note(message: str) -> None:
    """Print one line on stderr that is no error."""
    from guardreasoner_vl.cli.render import one_line

    typer.secho(f"note: {one_line(message)}", err=True)


def say_skipped(skipped: SkippedRows, title: str = "skipped") -> None:
    """Print a note for each reason, the most frequent first, with the names of the first few rows."""
    for reason, count in sorted(skipped.reasons.items(), key=lambda pair: -pair[1]):
        names = [name for name, name_reason in skipped.rows if name_reason == reason]
        examples = f": {'; '.join(names[:_SHOWN])}" if names else ""
        more = "; ..." if len(names) > _SHOWN else ""
        note(f"{title}: {count:,} rows ({reason}){examples}{more}")


def _usage_fault(error: Any) -> int:
    """Print an error of usage in one line that names the command's --help."""
    message = str(error.format_message()).replace("Value error, ", "")
    if not message.strip():  # no arguments at all: the help was shown
        return ERROR
    context = getattr(error, "ctx", None)
    return say(f"{message} See {context.command_path} --help." if context else message)


def _unforeseen(error: Exception) -> int:
    """Print an internal fault: its type and place, but not its message, which could show what was judged."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    where = f"{Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}" if trace else "an unknown place"
    return say(f"internal fault: {type(error).__name__} in {where}; please report it")


def _closed_pipe() -> int:
    """Redirect stdout, whose reader is gone, to the null device, or Python reports another error at exit.

    The exit code is an error's: 1 would mean "block".
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ERROR
