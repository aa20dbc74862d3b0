"""What several commands share: their options, how they open a guard, and how they talk to a terminal."""
# No `from __future__ import annotations`: typer reads the annotations.

import gc
import os
import shlex
import sys
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

# Installed beside us they cost seconds and 130 MB: transformers imports them wherever it finds them.
_NOT_NEEDED = ("sklearn", "scipy", "pandas")
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

Mode = Literal["slow", "fast", "hybrid"]
Preset = Literal["strict", "balanced", "permissive"]
EngineName = Literal["auto", "transformers", "openai"]

NO_CALIBRATION = Path("none")

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="'embedded' (the default), a model folder, a hub id, or what a server calls it.",
    ),
]
EngineOption = Annotated[
    EngineName,
    typer.Option("--engine", help="Run the model here, or ask an OpenAI-compatible server such as vLLM."),
]
UrlOption = Annotated[
    str | None,
    typer.Option("--base-url", metavar="URL", help="The server's address, such as http://localhost:8000/v1."),
]
ModeOption = Annotated[
    Mode,
    typer.Option("--mode", help="Reason first, give the verdict only, or reason where the score is in doubt."),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option("--threshold", metavar="0..1", help="From which score on it is harmful; else the label decides."),
]
OnErrorOption = Annotated[
    Literal["block", "allow"], typer.Option("--on-error", help="The action for what could not be judged.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="What `calibrate` measured; default: the file in the model's folder; 'none': the label decides.",
    ),
]
PresetOption = Annotated[
    Preset, typer.Option("--preset", help="The calibration's thresholds: a strict guard blocks more.")
]
LongInputOption = Annotated[
    Literal["refuse", "windows"],
    typer.Option("--long-input", help="Refuse what does not fit the model, or judge it in overlapping windows."),
]
WindowsOption = Annotated[
    int | None,
    typer.Option("--max-windows", min=1, metavar="N", help="Most windows of one exchange, with --long-input windows."),
]
TokensOption = Annotated[
    int,
    typer.Option("--max-new-tokens", min=1, metavar="N", help="Room for reasoning and verdict; one retry has more."),
]
ReasoningOption = Annotated[
    bool, typer.Option("--show-reasoning", help="Give the reasoning too; it may restate what was judged.")
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
"""Parameters that make a policy, as commands name them."""


def refuse_options(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise `InputError` if the command line has one of these parameters' options, which would be ignored."""
    for parameter in context.command.params:
        if parameter.name in names and _typed(context, parameter.name):
            raise InputError(f"{parameter.opts[0]} {why}")


def _typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_policy_options(context: typer.Context) -> None:
    """Raise `InputError` for policy options that have no effect beside the others."""
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
    """Whether a calibration is given, or lies in the model's folder."""
    from guardreasoner_vl.engines.model_files import CALIBRATION, resolve_folder

    given = values.get("calibration")
    if given is not None:
        return Path(given) != NO_CALIBRATION
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
    """What the options decide, one threshold for the request and the response."""
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


def open_guard(policy: "Policy", model: str | None, engine: EngineName, base_url: str | None) -> "Guard":
    """A base URL means a server, and a server needs one."""
    from guardreasoner_vl.guard import Guard

    if engine == "transformers" and base_url:
        raise InputError("--base-url needs --engine openai")
    if engine == "openai" and not base_url:
        raise InputError("--engine openai needs --base-url, such as http://localhost:8000/v1")
    options = {"base_url": base_url} if base_url else {}
    guard = Guard.load(model or "embedded", engine, policy=policy, **options)
    gc.freeze()  # searching what a model has imported for garbage would take a second at exit
    return guard


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int | None], None] | None]:
    """A bar on stderr, where that is a terminal."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def resumable() -> Iterator[None]:
    """Around work that is saved as it goes: an interrupted user is told so."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted; what was judged is saved, run the same command to go on")
        raise


def be_quiet() -> None:
    """Keep libraries from writing to the terminal, and from importing what is not needed."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for module in _NOT_NEEDED:
        sys.modules.setdefault(module, None)  # type: ignore[arg-type]


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=True)


def command_line() -> str:
    """What was typed, for reports."""
    return shlex.join(["guardreasoner-vl", *sys.argv[1:]])


def show(text: "Text", stderr: bool = False) -> None:
    """Print for people."""
    _console(stderr).print(text)
