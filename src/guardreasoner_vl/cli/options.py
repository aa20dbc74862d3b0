"""The options that several commands share, and what is made of them: a guard, its policy, a recipe."""
# No `from __future__ import annotations`: typer reads the annotations.

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardreasoner_vl.choices import Action, EngineName, LongInput, Mode, Ocr, Preset
from guardreasoner_vl.cli.errors import note
from guardreasoner_vl.cli.groups import option_names
from guardreasoner_vl.cli.terminal import be_quiet
from guardreasoner_vl.errors import InputError

if TYPE_CHECKING:
    from guardreasoner_vl.guard import Guard
    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.recipe import Recipe
    from guardreasoner_vl.scale.ray_guard import RayGuard

NO_CALIBRATION = Path("none")

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="'embedded' (the default), a model folder, a hub id, or the model's name on the server.",
    ),
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
TokensOption = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", min=1, metavar="N", help="Token limit of reasoning and verdict; one retry may use more."
    ),
]


@dataclass(frozen=True)
class EngineOptions:
    """Which model judges, and where it runs."""

    model: ModelOption = None
    engine: Annotated[
        EngineName,
        typer.Option(
            "--engine",
            help="Run the model in this process (transformers; openvino for CPUs; vllm for large batches on a GPU), or "
            "ask an OpenAI-compatible server such as vLLM.",
        ),
    ] = "auto"
    base_url: UrlOption = None
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="DIR", help="The folder of a LoRA adapter that was trained from --model."),
    ] = None

    def open_guard(self, policy: "Policy") -> "Guard":
        """Load the guard. Raises `InputError` unless a base URL is given exactly if a server is asked."""
        from guardreasoner_vl.guard import Guard

        if self.engine not in ("auto", "openai") and self.base_url:
            raise InputError("--base-url needs --engine openai")
        if self.engine == "openai" and not self.base_url:
            raise InputError("--engine openai needs --base-url, such as http://localhost:8000/v1")
        chosen: dict[str, Any] = {"base_url": self.base_url, "adapter": self.adapter}
        options = {name: value for name, value in chosen.items() if value}
        guard = Guard.load(self.model or "embedded", self.engine, policy=policy, **options)
        gc.freeze()  # a collection over all that a model has imported would take a second at exit
        return guard


@dataclass(frozen=True)
class ClusterOptions:
    """Whether the rows are judged here, or shared by guards on a Ray cluster."""

    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Share the rows among guards on a Ray cluster: HOST:PORT of its head, 'auto' on one of its machines, "
            "or 'local', a cluster of this machine alone.",
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, metavar="N", help="The number of guards on the cluster; by default one on each GPU."
        ),
    ] = None

    @contextmanager
    def open_guard(self, engine: EngineOptions, policy: "Policy") -> Iterator["Guard | RayGuard"]:
        """The guard of the options, or with --ray many guards as one; prints how many workers were lost."""
        if self.ray is None:
            if self.workers is not None:
                raise InputError("--workers needs --ray, the address of the cluster that they run on")
            with engine.open_guard(policy) as guard:
                yield guard
            return
        from guardreasoner_vl.scale.ray_guard import RayGuard

        opened = partial(_open_quietly, engine, policy)
        with RayGuard(self.ray, opened, policy, self.workers, on_gpus=engine.base_url is None) as guards:
            try:
                yield guards
            finally:
                if guards.lost:
                    note(f"{guards.lost:,} workers were lost and replaced; Ray's logs say why")


def _open_quietly(engine: EngineOptions, policy: "Policy") -> "Guard":
    """A worker's guard."""
    be_quiet()
    return engine.open_guard(policy)


@dataclass(frozen=True)
class LabelOptions:
    """How a label is decided."""

    mode: ModeOption = "slow"
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            metavar="0..1",
            help="Block at or above this P(harmful); by default the calibration's threshold, and without a calibration "
            "the label decides.",
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="A file that `calibrate` wrote; by default the one in the model's folder; 'none': the label decides.",
        ),
    ] = None
    preset: Annotated[
        Preset, typer.Option("--preset", help="Which of the calibration's thresholds to use; strict blocks more.")
    ] = "balanced"


@dataclass(frozen=True)
class InputOptions:
    """How the input is read, and how long it and the answer may be."""

    long_input: Annotated[
        LongInput,
        typer.Option(
            "--long-input",
            help="Refuse input that is longer than the model's context, or judge it in overlapping windows.",
        ),
    ] = "refuse"
    max_windows: Annotated[
        int | None,
        typer.Option(
            "--max-windows", min=1, metavar="N", help="At most N windows for an exchange, with --long-input windows."
        ),
    ] = None
    max_new_tokens: TokensOption = 1024
    ocr: Annotated[
        Ocr,
        typer.Option(
            "--ocr", help="Read the words printed in images before judging; auto: if the model does not read them."
        ),
    ] = "auto"


@dataclass(frozen=True)
class VerdictOptions:
    """What a verdict leads to, and what is shown of it."""

    on_error: Annotated[
        Action,
        typer.Option(
            "--on-error",
            help="The action if a fault of the guard left an exchange unjudged; other errors are always blocked.",
        ),
    ] = "block"
    show_reasoning: Annotated[
        bool, typer.Option("--show-reasoning", help="Show the reasoning too; it may quote what was judged.")
    ] = False


POLICY_OPTIONS = (*option_names(LabelOptions, InputOptions), "on_error")
"""The parameters of commands from which `policy_of` makes a policy."""


def policy_of(labels: LabelOptions, inputs: InputOptions, verdicts: VerdictOptions = VerdictOptions()) -> "Policy":
    """The policy of the options; the threshold applies to the request and to the response."""
    from guardreasoner_vl.judging.calibration import read_calibration
    from guardreasoner_vl.judging.policy import MAX_WINDOWS, Policy

    if inputs.max_windows is not None and inputs.long_input != "windows":
        raise InputError("--max-windows needs --long-input windows")
    calibration = labels.calibration
    return Policy(
        mode=labels.mode,
        thresholds=(labels.threshold, labels.threshold),
        on_error=verdicts.on_error,
        long_input=inputs.long_input,
        max_windows=inputs.max_windows or MAX_WINDOWS,
        max_new_tokens=inputs.max_new_tokens,
        ocr=inputs.ocr,
        calibration=read_calibration(calibration) if calibration not in (None, NO_CALIBRATION) else None,
        folder_calibration=calibration != NO_CALIBRATION,
        preset=labels.preset,
    )


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
    if values.get("base_url") or values.get("adapter"):
        return False
    return (resolve_folder(values.get("model") or "embedded") / CALIBRATION).is_file()


def read_recipe(recipe: Path) -> "Recipe":
    """Load a recipe, given by its path or by the name of a shipped one. Raises `RecipeError`."""
    from guardreasoner_vl.recipe import load_recipe
    from guardreasoner_vl.recipe.find import find_recipe

    return load_recipe(find_recipe(recipe))
