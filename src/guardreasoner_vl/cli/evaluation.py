"""The commands that measure guards."""
# No `from __future__ import annotations`: typer reads the annotations. Whatever else a command needs is
# imported inside it, so that --help stays instant.

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from guardreasoner_vl.cli.errors import note, say_set_aside
from guardreasoner_vl.cli.options import (
    NO_CALIBRATION,
    POLICY_OPTIONS,
    CalibrationOption,
    EngineOption,
    LongInputOption,
    ModelOption,
    ModeOption,
    PresetOption,
    ThresholdOption,
    TokensOption,
    UrlOption,
    WindowsOption,
    be_quiet,
    check_policy_options,
    command_line,
    open_guard,
    policy_of,
    progress_bar,
    refuse_options,
    resumable,
)
from guardreasoner_vl.errors import DataError, InputError

UNPACKED = "images"
"""Below `--out`: images that stand inside a benchmark's records."""

if TYPE_CHECKING:
    from guardreasoner_vl.baselines.client import OtherGuard
    from guardreasoner_vl.baselines.shieldgemma import ShieldGemma2
    from guardreasoner_vl.evaluation.benchmarks.base import Loaded
    from guardreasoner_vl.evaluation.results import Baseline
    from guardreasoner_vl.guard import Guard
    from guardreasoner_vl.types import Sample


BenchmarkOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME|FILE", help="A known benchmark or a JSONL of samples; may be given often."),
]
EvaluationDataOption = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Where benchmarks and a recipe's sources lie, or hub:OWNER/NAME@REVISION."),
]
HeldOutOption = Annotated[
    Path | None,
    typer.Option(
        metavar="RECIPE", help="Judge the held-out rows of its sources, beside hashed words trained on the rest."
    ),
]
ApartOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Keep this benchmark out of the figures of all rows; may be given often."),
]
OtherGuardOption = Annotated[
    str | None,
    typer.Option("--guard", metavar="NAME", help="Another guard at --base-url, asked its own way: wildguard, ..."),
]


def evaluate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The evaluation's folder; one that stopped goes on there.")],
    benchmark: BenchmarkOption = None,
    data: EvaluationDataOption = None,
    recipe: HeldOutOption = None,
    apart: ApartOption = None,
    other: OtherGuardOption = None,
    model: ModelOption = None,
    engine: EngineOption = "auto",
    base_url: UrlOption = None,
    mode: ModeOption = "slow",
    threshold: ThresholdOption = None,
    calibration: CalibrationOption = None,
    preset: PresetOption = "balanced",
    long_input: LongInputOption = "refuse",
    max_windows: WindowsOption = None,
    max_new_tokens: TokensOption = 1024,
    content: Annotated[
        bool, typer.Option("--content", help="Store texts and reasoning with the predictions; they may be harmful.")
    ] = False,
) -> None:
    """Judge labelled benchmarks as in production; write predictions, results.json, report.md and report.html.

    Without --benchmark and --recipe: the 14 of the paper, which --data holds.
    """
    if other:
        unused = ("engine", *POLICY_OPTIONS)
        refuse_options(context, unused, "has no effect with --guard, which has its own settings: leave it out")
    else:
        check_policy_options(context)
    _check_data(context, benchmark, recipe)
    from guardreasoner_vl.evaluation.benchmarks.find import find
    from guardreasoner_vl.evaluation.predictions import PREDICTIONS, read_predictions
    from guardreasoner_vl.evaluation.write import write_report

    train, loaded = _held_out(recipe, data, out) if recipe else ([], [])
    if benchmark or not recipe:
        loaded += find(benchmark or (), data, out / UNPACKED)
    baselines = _hashed_words(train, loaded)
    be_quiet()  # only now: the baseline needs scikit-learn, which nothing after it does
    from guardreasoner_vl.stages import evaluate as stage

    for each in loaded:
        say_set_aside(each.set_aside)
        if each.size_differs:
            note(each.size_differs)
    policy = policy_of(mode, threshold, "block", long_input, max_new_tokens, calibration, preset, max_windows)

    def opened() -> "Guard | OtherGuard | ShieldGemma2":
        return _other_guard(other, base_url, model) if other else open_guard(policy, model, engine, base_url)

    with resumable(), opened() as guard, progress_bar() as progress:
        results = stage.run(
            guard, loaded, out, content=content, baselines=baselines, apart=apart or (), progress=progress
        )
    if lacking := write_report(results, list(read_predictions(out / PREDICTIONS)), out, command_line()):
        note(lacking)
    typer.echo(str(out / "report.md"))
    if results.unanswered:
        note(results.warnings[-1])


def score(
    predictions: Annotated[
        Path, typer.Argument(metavar="PREDICTIONS.jsonl", help="Rows {prompt, label, predict}, or {id, predict}.")
    ],
    rule: Annotated[
        Literal["strict", "guardreasoner"],
        typer.Option("--rule", help="Count by the protocol's grammar, or as the GuardReasoner release does."),
    ] = "strict",
    gold: Annotated[
        Path | None, typer.Option(metavar="SAMPLES.jsonl", help="The labelled samples that the ids belong to.")
    ] = None,
    target: Annotated[
        Literal["request", "response"] | None,
        typer.Option("--target", help="What a label judges that is the bare word harmful or unharmful."),
    ] = None,
) -> None:
    """Score answers that another program stored; a row without an answer counts as wrong."""
    from guardreasoner_vl.evaluation.external_predictions import read_stored
    from guardreasoner_vl.evaluation.report import markdown_table
    from guardreasoner_vl.evaluation.scoring import score_table

    if gold and target:
        raise InputError("--target is for labels beside the answers: the rows of --gold say what theirs judge")
    stored = read_stored(predictions, gold, target)
    say_set_aside(stored.set_aside)
    say_set_aside(stored.unanswered, "not answered, counted as wrong")
    typer.echo(markdown_table(score_table(stored.rows, rule)))


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that `evaluate --out` wrote.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Write the leaderboard there.")] = None,
) -> None:
    """Put evaluations beside each other: a leaderboard, and McNemar's test against the first one."""
    from guardreasoner_vl.evaluation.compare import markdown, read_evaluation
    from guardreasoner_vl.storage.atomic import writing

    text = markdown([read_evaluation(folder) for folder in folders])
    if out:
        with writing(out):
            out.write_text(text, "utf-8")
    else:
        typer.echo(text, nl=False)


def calibrate(
    data: Annotated[
        Path,
        typer.Option(metavar="DATA", help="Labelled samples of your own traffic (JSONL), or a corpus: its test rows."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="The calibration; a run that stopped goes on.")],
    rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="At most so many of them, drawn by their ids.")
    ] = None,
    model: ModelOption = None,
    engine: EngineOption = "auto",
    base_url: UrlOption = None,
    reasoned: Annotated[
        float, typer.Option(metavar="0..1", help="The share of rows that hybrid mode shall reason about.")
    ] = 0.3,
    max_new_tokens: TokensOption = 1024,
) -> None:
    """Fit temperatures, thresholds and the hybrid band to labelled samples, for --calibration."""
    be_quiet()
    from guardreasoner_vl.corpus.store import is_corpus, read_split
    from guardreasoner_vl.evaluation.benchmarks.find import drawn, from_file, from_samples
    from guardreasoner_vl.evaluation.report import markdown_table
    from guardreasoner_vl.evaluation.scoring import calibration_table
    from guardreasoner_vl.sources.skipped import SetAside
    from guardreasoner_vl.stages import calibrate as stage

    tests = from_samples(data.name, read_split(data, "test"), data, SetAside()) if is_corpus(data) else None
    loaded = drawn(tests or from_file(data), rows)
    say_set_aside(loaded.set_aside)
    policy = policy_of("fast", None, "block", "refuse", max_new_tokens, NO_CALIBRATION)
    with resumable(), open_guard(policy, model, engine, base_url) as guard, progress_bar() as progress:
        found = stage.run(guard, [loaded], out, reasoned=reasoned, progress=progress)
    typer.echo(markdown_table(calibration_table(found)))
    low, high = found.band
    typer.echo(
        f"\nhybrid reasons about {found.reasoned:.0%} of the rows (fast scores from {low:.3f} to {high:.3f}): "
        f"{found.hybrid_tokens:.1f} output tokens expected; fast {found.fast.completion_tokens:.1f}, "
        f"slow {found.slow.completion_tokens:.1f}"
    )


def robustness(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The report's folder; a run that stopped goes on there.")],
    benchmark: Annotated[
        list[str],
        typer.Option(metavar="NAME|FILE", help="A known benchmark or a JSONL of samples; may be given often."),
    ],
    data: Annotated[str | None, typer.Option(metavar="DIR", help="Where the benchmarks lie.")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this change, such as 'upper case'; may be given often."),
    ] = None,
    model: ModelOption = None,
    engine: EngineOption = "auto",
    base_url: UrlOption = None,
    mode: ModeOption = "slow",
    long_input: LongInputOption = "refuse",
    max_windows: WindowsOption = None,
    max_new_tokens: TokensOption = 1024,
) -> None:
    """Judge benchmarks again under changes that keep the labels, and tell how many verdicts flip."""
    check_policy_options(context)
    _check_data(context, benchmark)
    be_quiet()
    from guardreasoner_vl.evaluation.benchmarks.find import find
    from guardreasoner_vl.evaluation.perturbations import NAMES
    from guardreasoner_vl.evaluation.report import markdown_table
    from guardreasoner_vl.stages import robustness as stage
    from guardreasoner_vl.storage.atomic import write_text

    loaded = find(benchmark, data, out / UNPACKED)
    for each in loaded:
        say_set_aside(each.set_aside)
    policy = policy_of(mode, None, "block", long_input, max_new_tokens, max_windows=max_windows)
    with resumable(), open_guard(policy, model, engine, base_url) as guard, progress_bar() as progress:
        found = stage.run(guard, loaded, out, names=change or NAMES, progress=progress)
        settings = f"{guard.model.name} {guard.model.revision or ''}".strip()
    parts = [f"# Robustness of {settings}, {mode} mode", f"Made by `{command_line()}`."]
    for target, by in found.items():
        if len(lines := stage.table(by)) > 1:
            parts += [f"## {target.capitalize()}s", markdown_table(lines)]
    write_text(out / "robustness.md", "\n\n".join(parts) + "\n")
    typer.echo(str(out / "robustness.md"))


COMMANDS = (evaluate, score, compare, calibrate, robustness)


def _check_data(context: typer.Context, benchmarks: list[str] | None, recipe: Path | None = None) -> None:
    """Raise `InputError` if `--data` is given although no benchmark is read from it."""
    if benchmarks and not recipe and all(Path(name).is_file() for name in benchmarks):
        refuse_options(context, ("data",), "has no effect where every --benchmark is a file: leave it out")


def _other_guard(name: str, base_url: str | None, model: str | None) -> "OtherGuard | ShieldGemma2":
    from guardreasoner_vl.baselines.client import LOCAL, OtherGuard

    if name == LOCAL:
        from guardreasoner_vl.baselines.shieldgemma import ShieldGemma2

        if base_url is not None or model is None:
            raise InputError(f"--guard {LOCAL} runs here: give --model, its folder or hub id, and no --base-url")
        return ShieldGemma2(model)
    if base_url is None or model is None:
        raise InputError("--guard needs --base-url and --model: the server's address and its name for the guard")
    return OtherGuard(name, base_url, model)


def _held_out(recipe: Path, data: str | None, out: Path) -> "tuple[list[Sample], list[Loaded]]":
    """A recipe's training rows, and the held-out rows of its sources as one benchmark each."""
    from guardreasoner_vl.evaluation.benchmarks.find import by_source
    from guardreasoner_vl.recipe import load_recipe
    from guardreasoner_vl.sources.mixture import build_mixture

    if data is None:
        raise InputError("--recipe needs --data: the folder that holds its sources")
    made = load_recipe(recipe)
    mixture = build_mixture(made.data, Path(data), out / "data", made.seed, curated=True)
    loaded = list(by_source(mixture.held_out, recipe))
    if not loaded:
        raise DataError(f"{data}: none of the recipe's rows is held out; give more rows, or --benchmark FILE")
    return mixture.train, loaded


def _hashed_words(train: "list[Sample]", loaded: "list[Loaded]") -> "dict[str, Baseline]":
    """The shallow baseline, where there are rows to train it on."""
    from guardreasoner_vl.evaluation.baseline import hashed_words

    return {"hashed words": hashed_words(train, loaded)} if train else {}
