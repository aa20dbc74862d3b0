"""How a command fails: one line on stderr and exit code 2, whatever went wrong."""

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

    from guardreasoner_vl.sources.skipped import SetAside

OK, BLOCK, ERROR = 0, 1, 2
_SHOWN = 3


class OneLineErrors(TyperGroup):
    """Every failure is one line on stderr and an exit code; no traceback, which could show what was judged."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: ARG002
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            sys.stdout.flush()
        except GuardError as error:
            code = say(str(error))
        except (BrokenPipeError, SystemExit):  # typer answers a closed pipe with exit code 1, which is "block" here
            code = _hung_up()
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


def say_set_aside(set_aside: SetAside, what: str = "set aside") -> None:
    """A note for each reason, the most frequent first, with the places of the first few rows."""
    for reason, count in sorted(set_aside.reasons.items(), key=lambda pair: -pair[1]):
        names = [name for name, why in set_aside.rows if why == reason]
        shown = f": {'; '.join(names[:_SHOWN])}" if names else ""
        more = "; ..." if len(names) > _SHOWN else ""
        note(f"{what}: {count:,} rows ({reason}){shown}{more}")


def _usage_fault(error: Any) -> int:
    """typer's own complaints, in one line that names the page to read."""
    message = str(error.format_message()).replace("Value error, ", "")
    if not message.strip():  # no arguments at all: the help was shown
        return ERROR
    context = getattr(error, "ctx", None)
    return say(f"{message} See {context.command_path} --help." if context else message)


def _unforeseen(error: Exception) -> int:
    """A fault of ours: where it happened, not what it says, which could be what was judged."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    where = f"{Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}" if trace else "an unknown place"
    return say(f"internal fault: {type(error).__name__} in {where}; please report it")


def _hung_up() -> int:
    """Nobody reads stdout any more; point it elsewhere, or Python complains once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ERROR
