"""The commands that measure guards."""
# No `from __future__ import annotations`: typer reads the annotations. Whatever else a command needs is
# imported inside it, so that --help stays instant.

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guardreasoner_vl.choices import RuleName, Target
from guardreasoner_vl.cli.errors import note, say_skipped
from guardreasoner_vl.cli.groups import grouped, option_names
from guardreasoner_vl.cli.options import (
    NO_CALIBRATION,
    POLICY_OPTIONS,
    ClusterOptions,
    EngineOptions,
    InputOptions,
    LabelOptions,
    ModeOption,
    TokensOption,
    check_policy_options,
    policy_of,
    read_recipe,
    refuse_options,
)
from guardreasoner_vl.cli.terminal import be_quiet, command_line, progress_bar, resumable
from guardreasoner_vl.errors import DataError, InputError

UNPACKED = "images"
"""The folder below `--out` for images that are stored inside a benchmark's records."""

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from guardreasoner_vl.baselines.client import BaselineGuard
    from guardreasoner_vl.baselines.shieldgemma import ShieldGemma2
    from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark
    from guardreasoner_vl.evaluation.results import Baseline
    from guardreasoner_vl.guard import Moderator
    from guardreasoner_vl.types import Exchange, Sample


_BENCHMARK = typer.Option(metavar="NAME|FILE", help="A known benchmark or a JSONL file of samples; repeatable.")
EvaluationDataOption = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The folder of benchmarks and of a recipe's sources, or hub:OWNER/NAME@REVISION."),
]
HeldOutOption = Annotated[
    Path | None,
    typer.Option(
        metavar="RECIPE",
        help="Judge the held-out rows of a recipe's sources; adds a baseline (hashed n-grams + logistic regression) "
        "trained on the other rows.",
    ),
]
ExcludedOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Leave this benchmark out of every figure but its own line; repeatable."),
]
BaselineGuardOption = Annotated[
    str | None,
    typer.Option(
        "--guard", metavar="NAME", help="Another guard at --base-url, asked in its own format: wildguard, ..."
    ),
]


@grouped
def evaluate(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of the evaluation; a stopped run resumes there.")
    ],
    benchmark: Annotated[list[str] | None, _BENCHMARK] = None,
    data: EvaluationDataOption = None,
    recipe: HeldOutOption = None,
    exclude_from_total: ExcludedOption = None,
    other: BaselineGuardOption = None,
    *,
    engine: EngineOptions,
    cluster: ClusterOptions,
    labels: LabelOptions,
    inputs: InputOptions,
    content: Annotated[
        bool, typer.Option("--content", help="Store texts and reasoning with the predictions; they may be harmful.")
    ] = False,
) -> None:
    """Evaluate a guard on labelled benchmarks; write predictions, results.json, report.md and report.html.

    Without --benchmark and --recipe the 14 benchmarks of the paper are read from --data.
    """
    if other:
        unused = ("engine", "adapter", *option_names(ClusterOptions), *POLICY_OPTIONS)
        refuse_options(context, unused, "has no effect with --guard, which has its own settings: leave it out")
    else:
        check_policy_options(context)
    _check_data(context, benchmark, recipe)
    from guardreasoner_vl.evaluation.benchmarks.find import find
    from guardreasoner_vl.evaluation.predictions import PREDICTIONS, read_predictions
    from guardreasoner_vl.evaluation.report import write_report

    train, loaded = _held_out(recipe, data, out) if recipe else ([], [])
    if benchmark or not recipe:
        loaded += find(benchmark or (), data, out / UNPACKED)
    baselines = _shallow_baseline(train, loaded)
    be_quiet()  # after the baseline, which imports scikit-learn
    from guardreasoner_vl.stages import evaluate as stage

    for each in loaded:
        say_skipped(each.skipped)
        if each.size_differs:
            note(each.size_differs)
    policy = policy_of(labels, inputs)

    def opened() -> "AbstractContextManager[Moderator[Exchange]]":
        return _other_guard(other, engine) if other else cluster.open_guard(engine, policy)

    with resumable(), opened() as guard, progress_bar() as progress:
        excluded = exclude_from_total or ()
        results = stage.run(
            guard, loaded, out, content=content, baselines=baselines, excluded=excluded, progress=progress
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
        RuleName,
        typer.Option("--rule", help="strict: the protocol's grammar; guardreasoner: the rule of GuardReasoner's code."),
    ] = "strict",
    gold: Annotated[
        Path | None, typer.Option(metavar="SAMPLES.jsonl", help="The labelled samples, for rows of ids.")
    ] = None,
    target: Annotated[
        Target | None,
        typer.Option("--target", help="What a label that is a bare word (harmful or unharmful) judges."),
    ] = None,
) -> None:
    """Score answers stored by another program; a row without an answer counts as wrong."""
    from guardreasoner_vl.evaluation.external_predictions import read_external_predictions
    from guardreasoner_vl.evaluation.report import markdown_table, score_table

    if gold and target:
        raise InputError("--target has no effect with --gold, whose rows name the target of their labels: leave it out")
    stored = read_external_predictions(predictions, gold, target)
    say_skipped(stored.skipped)
    say_skipped(stored.unanswered, "not answered, counted as wrong")
    typer.echo(markdown_table(score_table(stored.rows, rule)))


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that `evaluate --out` wrote.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write the leaderboard to this file instead of stdout.")
    ] = None,
) -> None:
    """Compare evaluations: a leaderboard, and McNemar's test of each against the first one."""
    from guardreasoner_vl.evaluation.compare import comparison_markdown, read_evaluation
    from guardreasoner_vl.storage.atomic import write_text

    text = comparison_markdown([read_evaluation(folder) for folder in folders])
    if out:
        write_text(out, text)
    else:
        typer.echo(text, nl=False)


@grouped
def calibrate(
    data: Annotated[
        Path,
        typer.Option(
            metavar="DATA", help="Labelled samples of your own traffic (JSONL), or a corpus, whose test rows are used."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="The calibration file; a stopped run resumes.")],
    rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use at most N of the rows, selected by their ids.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Leave out the rows of this source; repeatable.")
    ] = None,
    *,
    engine: EngineOptions,
    reasoned: Annotated[
        float, typer.Option(metavar="0..1", help="The share of rows that hybrid mode is to reason about.")
    ] = 0.3,
    request_false_alarms: Annotated[
        float,
        typer.Option(metavar="0.01..0.1", help="The share of harmless requests that the preset 'balanced' may flag."),
    ] = 0.05,
    response_false_alarms: Annotated[
        float,
        typer.Option(metavar="0.01..0.1", help="The share of harmless responses that the preset 'balanced' may flag."),
    ] = 0.05,
    max_new_tokens: TokensOption = InputOptions.max_new_tokens,
) -> None:
    """Fit temperatures, thresholds and the hybrid band to labelled samples, for --calibration."""
    be_quiet()
    from guardreasoner_vl.corpus.store import is_corpus, read_split
    from guardreasoner_vl.evaluation.benchmarks.find import from_file, from_samples, subsample, without_sources
    from guardreasoner_vl.evaluation.report import calibration_table, markdown_table
    from guardreasoner_vl.sources.skipped import SkippedRows
    from guardreasoner_vl.stages import calibrate as stage

    tests = from_samples(data.name, read_split(data, "test"), data, SkippedRows()) if is_corpus(data) else None
    loaded = subsample(without_sources(tests or from_file(data), exclude or ()), rows)
    say_skipped(loaded.skipped)
    policy = policy_of(
        LabelOptions(mode="fast", calibration=NO_CALIBRATION), InputOptions(max_new_tokens=max_new_tokens)
    )
    with resumable(), engine.open_guard(policy) as guard, progress_bar() as progress:
        rates = (request_false_alarms, response_false_alarms)
        fitted = stage.run(guard, [loaded], out, reasoned=reasoned, false_alarms=rates, progress=progress)
    typer.echo(markdown_table(calibration_table(fitted)))
    low, high = fitted.band
    typer.echo(
        f"\nhybrid reasons about {fitted.reasoned:.0%} of the rows (fast scores from {low:.3f} to {high:.3f}): "
        f"{fitted.hybrid_tokens:.1f} output tokens expected; fast {fitted.fast.completion_tokens:.1f}, "
        f"slow {fitted.slow.completion_tokens:.1f}"
    )


@grouped
def robustness(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the report; a stopped run resumes there.")],
    benchmark: Annotated[list[str], _BENCHMARK],
    data: Annotated[str | None, typer.Option(metavar="DIR", help="The folder of the benchmarks.")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Apply only this change, such as 'upper case'; repeatable."),
    ] = None,
    *,
    engine: EngineOptions,
    mode: ModeOption = LabelOptions.mode,
    inputs: InputOptions,
) -> None:
    """Judge benchmarks under changes that keep the labels, and report how many verdicts flip."""
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
        say_skipped(each.skipped)
    policy = policy_of(LabelOptions(mode=mode), inputs)
    with resumable(), engine.open_guard(policy) as guard, progress_bar() as progress:
        results = stage.run(guard, loaded, out, names=change or NAMES, progress=progress)
        settings = f"{guard.model.name} {guard.model.revision or ''}".strip()
    parts = [f"# Robustness of {settings}, {mode} mode", f"Made by `{command_line()}`."]
    for target, by in results.items():
        if len(lines := stage.flips_table(by)) > 1:
            parts += [f"## {target.capitalize()}s", markdown_table(lines)]
    write_text(out / "robustness.md", "\n\n".join(parts) + "\n")
    typer.echo(str(out / "robustness.md"))


COMMANDS = (evaluate, calibrate, compare, robustness, score)


def _check_data(context: typer.Context, benchmarks: list[str] | None, recipe: Path | None = None) -> None:
    """Raise `InputError` if `--data` is given but no benchmark is read from it."""
    if benchmarks and not recipe and all(Path(name).is_file() for name in benchmarks):
        refuse_options(context, ("data",), "has no effect where every --benchmark is a file: leave it out")


def _other_guard(name: str, engine: EngineOptions) -> "BaselineGuard | ShieldGemma2":
    from guardreasoner_vl.baselines.client import LOCAL, BaselineGuard

    model, base_url = engine.model, engine.base_url
    if name == LOCAL:
        from guardreasoner_vl.baselines.shieldgemma import ShieldGemma2

        if base_url is not None or model is None:
            raise InputError(f"--guard {LOCAL} runs here: give --model, its folder or hub id, and no --base-url")
        return ShieldGemma2(model)
    if base_url is None or model is None:
        raise InputError("--guard needs --base-url and --model: the server's address and its name for the guard")
    return BaselineGuard(name, base_url, model)


def _held_out(recipe: Path, data: str | None, out: Path) -> "tuple[list[Sample], list[LoadedBenchmark]]":
    """A recipe's training rows, and the held-out rows of each of its sources as a benchmark."""
    from guardreasoner_vl.evaluation.benchmarks.find import by_source
    from guardreasoner_vl.sources.mixture import build_mixture

    if data is None:
        raise InputError("--recipe needs --data: the folder that holds its sources")
    settings = read_recipe(recipe)
    mixture = build_mixture(settings.data, Path(data), out / "data", settings.seed, curated=True)
    loaded = list(by_source(mixture.held_out, recipe))
    if not loaded:
        raise DataError(f"{data}: none of the recipe's rows is held out; give more rows, or --benchmark FILE")
    return mixture.train, loaded


def _shallow_baseline(train: "list[Sample]", loaded: "list[LoadedBenchmark]") -> "dict[str, Baseline]":
    """The shallow baseline, if there are rows to train it on."""
    from guardreasoner_vl.evaluation.baseline import HASHED_NGRAMS, hashed_ngrams

    return {HASHED_NGRAMS: hashed_ngrams(train, loaded)} if train else {}
