"""What several commands share: options, opening a guard, finding a recipe, and output to a terminal."""
# No `from __future__ import annotations`: typer reads the annotations.

import gc
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from guardreasoner_vl.cli.errors import say
from guardreasoner_vl.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from guardreasoner_vl.guard import Guard
    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.recipe import Recipe

Progress = Callable[[int, int | None], None]
"""Receives the number of items done, and the total if it is known."""

LINE_SECONDS = 30.0
"""Without a terminal, progress is a line on stderr at most this often."""

# transformers imports these if they are installed, which takes seconds and 130 MB.
_NOT_NEEDED = ("sklearn", "scipy", "pandas")
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
_NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

Mode = Literal["slow", "fast", "hybrid"]
Preset = Literal["strict", "balanced", "permissive"]
EngineName = Literal["auto", "transformers", "openai"]

NO_CALIBRATION = Path("none")

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="'embedded' (the default), a model folder, a hub id, or the model's name on the server.",
    ),
]
EngineOption = Annotated[
    EngineName,
    typer.Option("--engine", help="Run the model in this process, or ask an OpenAI-compatible server such as vLLM."),
]
UrlOption = Annotated[
    str | None,
    typer.Option("--base-url", metavar="URL", help="The server's address, such as http://localhost:8000/v1."),
]
ModeOption = Annotated[
    Mode,
    typer.Option(
        "--mode", help="slow: reason, then label; fast: label only; hybrid: reason only if the fast score is in doubt."
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        "--threshold", metavar="0..1", help="Block at or above this P(harmful); without it the label decides."
    ),
]
OnErrorOption = Annotated[
    Literal["block", "allow"], typer.Option("--on-error", help="The action if an exchange could not be judged.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="A file that `calibrate` wrote; by default the one in the model's folder; 'none': the label decides.",
    ),
]
PresetOption = Annotated[
    Preset, typer.Option("--preset", help="Which of the calibration's thresholds to use; strict blocks more.")
]
LongInputOption = Annotated[
    Literal["refuse", "windows"],
    typer.Option(
        "--long-input", help="Refuse input that is longer than the model's context, or judge it in overlapping windows."
    ),
]
WindowsOption = Annotated[
    int | None,
    typer.Option(
        "--max-windows", min=1, metavar="N", help="At most N windows for an exchange, with --long-input windows."
    ),
]
TokensOption = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", min=1, metavar="N", help="Token limit of reasoning and verdict; one retry may use more."
    ),
]
ReasoningOption = Annotated[
    bool, typer.Option("--show-reasoning", help="Show the reasoning too; it may quote what was judged.")
]


POLICY_OPTIONS = (
    "mode",
    "threshold",
    "calibration",
    "preset",
    "on_error",
    "long_input",
    "max_windows",
    "max_new_tokens",
)
"""The parameters of commands from which `policy_of` makes a policy."""


def refuse_options(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise `InputError` if the command line sets one of the parameters `names`, which would be ignored."""
    for parameter in context.command.params:
        if parameter.name in names and _typed(context, parameter.name):
            raise InputError(f"{parameter.opts[0]} {why}")


def _typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_policy_options(context: typer.Context) -> None:
    """Raise `InputError` for policy options that other options make ineffective."""
    values = context.params
    if _typed(context, "preset"):
        if not _is_calibrated(values):
            raise InputError(
                "--preset has no effect without a calibration, whose thresholds it chooses from: give --calibration too"
            )
        if values.get("threshold") is not None:
            raise InputError("--preset and --threshold both set the threshold: give one of them")
    if values.get("mode") == "fast" and values.get("long_input") != "windows":
        refuse_options(
            context, ("max_new_tokens",), "has no effect with --mode fast, which does not reason: leave it out"
        )


def _is_calibrated(values: Mapping[str, Any]) -> bool:
    """Whether a calibration is given on the command line, or exists in the model's folder."""
    from guardreasoner_vl.engines.model_files import CALIBRATION, resolve_folder

    calibration = values.get("calibration")
    if calibration is not None:
        return Path(calibration) != NO_CALIBRATION
    if values.get("base_url"):
        return False
    return (resolve_folder(values.get("model") or "embedded") / CALIBRATION).is_file()


def policy_of(
    mode: Mode,
    threshold: float | None,
    on_error: Literal["block", "allow"],
    long_input: Literal["refuse", "windows"],
    max_new_tokens: int,
    calibration: Path | None = None,
    preset: Preset = "balanced",
    max_windows: int | None = None,
) -> "Policy":
    """The policy of the options; the threshold applies to the request and to the response."""
    from guardreasoner_vl.judging.calibration import read_calibration
    from guardreasoner_vl.judging.policy import MAX_WINDOWS, Policy

    if max_windows is not None and long_input != "windows":
        raise InputError("--max-windows needs --long-input windows")
    return Policy(
        mode=mode,
        thresholds=(threshold, threshold),
        on_error=on_error,
        long_input=long_input,
        max_windows=max_windows or MAX_WINDOWS,
        max_new_tokens=max_new_tokens,
        calibration=read_calibration(calibration) if calibration not in (None, NO_CALIBRATION) else None,
        folder_calibration=calibration != NO_CALIBRATION,
        preset=preset,
    )


def read_recipe(recipe: Path) -> "Recipe":
    """Load a recipe, given by its path or by the name of a shipped one. Raises `RecipeError`."""
    from guardreasoner_vl.recipe import load_recipe
    from guardreasoner_vl.recipe.find import find_recipe

    return load_recipe(find_recipe(recipe))


def open_guard(policy: "Policy", model: str | None, engine: EngineName, base_url: str | None) -> "Guard":
    """Load the guard. Raises `InputError` unless a base URL is given exactly if a server is asked."""
    from guardreasoner_vl.guard import Guard

    if engine == "transformers" and base_url:
        raise InputError("--base-url needs --engine openai")
    if engine == "openai" and not base_url:
        raise InputError("--engine openai needs --base-url, such as http://localhost:8000/v1")
    options = {"base_url": base_url} if base_url else {}
    guard = Guard.load(model or "embedded", engine, policy=policy, **options)
    gc.freeze()  # a collection over all that a model has imported would take a second at exit
    return guard


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


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=True)


def command_line() -> str:
    """The command as typed, for reports."""
    return shlex.join(["guardreasoner-vl", *sys.argv[1:]])


def show(text: "Text", stderr: bool = False) -> None:
    """Print styled text."""
    _console(stderr).print(text)
