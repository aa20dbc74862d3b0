"""Output to a terminal, for all commands: progress, styled text, a log, and libraries that are kept quiet."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import typer

from guardreasoner_vl.cli.errors import say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Progress = Callable[[int, int | None], None]
"""Receives the number of items done, and the total if it is known."""

PACKAGE = "guardreasoner_vl"
"""The name of the package's logger."""

LINE_SECONDS = 30.0
"""Without a terminal, progress is a line on stderr at most this often."""

# transformers imports these if they are installed, which takes seconds and 130 MB.
_NOT_NEEDED = ("sklearn", "scipy", "pandas")
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
_NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show progress on stderr: as a bar if that is a terminal, else as a line every `LINE_SECONDS` seconds."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield _progress_lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _progress_lines() -> Progress:
    last = time.monotonic()

    def report(done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            typer.echo(f"progress: {done:,}" if total is None else f"progress: {done:,} of {total:,}", err=True)

    return report


def hide_bars() -> None:
    """Switch off the progress bars of libraries if stderr is no terminal; call this before they are imported."""
    if not sys.stderr.isatty():
        for name, value in _NO_BARS.items():
            os.environ.setdefault(name, value)


@contextmanager
def resumable() -> Iterator[None]:
    """Wrap work that is saved as it proceeds: an interrupt prints that the same command resumes it."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted; finished work is saved, run the same command to resume")
        raise


def be_quiet() -> None:
    """Keep libraries from printing, and from importing large packages that are not needed."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for module in _NOT_NEEDED:
        sys.modules.setdefault(module, None)  # type: ignore[arg-type]


def log_to_stderr(level: str) -> Callable[[], None]:
    """Print this package's log records from `level` up on stderr, as the service does; returns what ends it.

    Lines are JSON without the texts of exceptions, which may quote what was judged. No record goes to the handlers of
    other libraries, which would print these texts.
    """
    from guardreasoner_vl.service.logs import JsonFormatter

    logger, handler = logging.getLogger(PACKAGE), _StderrHandler()
    handler.setFormatter(JsonFormatter())
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False

    def end() -> None:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]

    return end


class _StderrHandler(logging.Handler):
    """Prints each record above a progress bar; one that cannot be printed is dropped."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            typer.echo(self.format(record), err=True)


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=True)


def command_line() -> str:
    """The command as typed, for reports."""
    return shlex.join(["guardreasoner-vl", *sys.argv[1:]])


def show(text: "Text", stderr: bool = False) -> None:
    """Print styled text."""
    _console(stderr).print(text)
