"""Figures of an evaluation as SVG (extra `eval`)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.errors import MissingExtraError
from guardreasoner_vl.evaluation.curves import curve, reliability
from guardreasoner_vl.evaluation.published import published_f1, published_tokens
from guardreasoner_vl.evaluation.report import TASKS, paper_f1
from guardreasoner_vl.evaluation.results import ALL, CATEGORY, MODALITY, judgement, truth

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guardreasoner_vl.evaluation.predictions import Prediction
    from guardreasoner_vl.evaluation.results import GroupResults, Results
    from guardreasoner_vl.types import Target

OWN, OTHER, THIRD = "#1f5fbf", "#b9c2cc", "#c4572e"
COMPARED = ("LLaMA Guard 3 Vision 11B", "GuardReasoner-VL 7B")
"""Published models shown for comparison."""

AVERAGE = "Average (All)"
_MOST_BARS, _MOST_NAMES = 40, 15


def draw_results(results: Results, rows: Sequence[Prediction]) -> dict[str, str]:
    """The figures as SVG texts, by name, without those that the rows do not define. Raises `MissingExtraError`."""
    figures: dict[str, str] = {}
    for target in TARGETS:
        groups = results.groups.get(target, {})
        if not groups:
            continue
        if _groups_to_show(results, target):
            figures[f"{target}_f1"] = _bars(results, target)
            figures[f"{target}_tokens"] = _tokens_figure(results, target)
        modalities = {name.removeprefix(MODALITY): one for name, one in groups.items() if name.startswith(MODALITY)}
        if len(modalities) > 1:
            figures[f"{target}_modality"] = _named_bars(
                {name: _rate(one.figures.counts.f1) for name, one in modalities.items()}, f"{target}s by modality"
            )
        pairs = [(gold == "harmful", judgement(row, target).score) for row in rows if (gold := truth(row, target))]
        truths = [harmful for harmful, score in pairs if score is not None]
        scores = [score for _, score in pairs if score is not None]
        if curve(truths, scores):
            figures[f"{target}_reliability"] = _reliability_figure(truths, scores, target)
            figures[f"{target}_threshold"] = _thresholds(truths, scores, target)
    return figures


def _bars(results: Results, target: Target) -> str:
    """F1 by benchmark; with published guards for the paper's benchmarks."""
    paper = paper_f1(results, target)
    if paper:
        names = [name for name in paper if paper[name] is not None]
        table = published_f1(TASKS[target])
        series = {model: [table[model].get(name) or 0 for name in names] for model in COMPARED}
        series[results.settings.model] = [paper[name] or 0 for name in names]
        return _grouped_bars(names, series, f"F1 of {target}s beside the paper's")
    values = {
        name: _rate(group.figures.counts.f1)
        for name, group in list(_groups_to_show(results, target).items())[:_MOST_BARS]
    }
    return _named_bars(values, f"F1 of {target}s")


def _groups_to_show(results: Results, target: Target) -> dict[str, GroupResults]:
    """The groups to show: all rows and each benchmark, if they have harmful rows."""
    return {
        name: group
        for name, group in results.groups[target].items()
        if not name.startswith((MODALITY, CATEGORY)) and group.figures.counts.recall is not None
    }


def _rate(value: float | None) -> float:
    return 100 * (value or 0.0)


def _named_bars(values: Mapping[str, float], title: str) -> str:
    figure, axes = new_axes(height=0.8 + 0.24 * len(values))
    names = list(values)[::-1]
    bars = axes.barh(names, [values[name] for name in names], color=OWN)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set(xlim=(0, 108), xlabel="F1, percent", title=title)
    return svg_of(figure)


def _grouped_bars(names: Sequence[str], series: Mapping[str, Sequence[float]], title: str) -> str:
    figure, axes = new_axes(width=max(6.5, 1.1 * len(names)))
    width = 0.8 / len(series)
    for number, (model, values) in enumerate(series.items()):
        colour = OWN if number == len(series) - 1 else (OTHER, THIRD)[number % 2]
        axes.bar([at + number * width for at in range(len(names))], values, width, label=model, color=colour)
    axes.set_xticks([at + 0.4 - width / 2 for at in range(len(names))], names, rotation=30, ha="right")
    axes.set(ylim=(0, 100), ylabel="F1, percent", title=title)
    axes.legend(frameon=False, fontsize=8)
    return svg_of(figure)


def _tokens_figure(results: Results, target: Target) -> str:
    figure, axes = new_axes()
    benchmarks = _groups_to_show(results, target)
    tokens = [one.figures.completion_tokens_mean for one in benchmarks.values()]
    values = [_rate(one.figures.counts.f1) for one in benchmarks.values()]
    axes.scatter(tokens, values, color=[THIRD if name == ALL else OWN for name in benchmarks], s=18)
    points = zip(benchmarks, tokens, values, strict=True)
    averages = _compared_averages(results, target)
    axes.scatter([x for _, x, _ in averages], [y for _, _, y in averages], color=OTHER, s=30, marker="D")
    for name, x, y in [*(point for point in points if point[0] == ALL or len(benchmarks) <= _MOST_NAMES), *averages]:
        axes.annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="output tokens, mean", ylabel="F1, percent", ylim=(0, 105), title=f"F1 of {target}s against tokens")
    return svg_of(figure)


def _compared_averages(results: Results, target: Target) -> list[tuple[str, float, float]]:
    """Name, tokens and average F1 of this guard and of the paper's; empty unless the whole average was judged."""
    average = paper_f1(results, target).get(AVERAGE)
    if average is None:
        return []
    table = published_f1(TASKS[target])
    tokens = results.groups[target][ALL].figures.completion_tokens_mean
    published = [(name, tokens, f1) for name, tokens in published_tokens().items() if (f1 := table[name][AVERAGE])]
    return [(f"{results.settings.model}, {AVERAGE}", tokens, average), *published]


def _reliability_figure(truths: Sequence[bool], scores: Sequence[float], target: Target) -> str:
    figure, axes = new_axes(width=4.2, height=4.0)
    bins = reliability(truths, scores)
    axes.plot([0, 1], [0, 1], color=OTHER, linewidth=1)
    most = max(one.rows for one in bins)
    sizes_of = [12 + 160 * one.rows / most for one in bins]
    axes.plot([one.score for one in bins], [one.harmful for one in bins], color=OWN, linewidth=1)
    axes.scatter([one.score for one in bins], [one.harmful for one in bins], s=sizes_of, color=OWN, alpha=0.7)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="score", ylabel="share that is harmful")
    axes.set_title(f"reliability, {target}s")
    return svg_of(figure)


def _thresholds(truths: Sequence[bool], scores: Sequence[float], target: Target) -> str:
    figure, axes = new_axes(height=3.4)
    points = curve(truths, scores)
    thresholds = [point.threshold for point in points]
    for name, colour, values in (
        ("recall", OWN, [point.recall for point in points]),
        ("false-positive rate", THIRD, [point.false_positive_rate for point in points]),
        ("F1", "#2d3640", [point.f1 for point in points]),
    ):
        axes.plot(thresholds, values, label=name, color=colour, linewidth=1.4)
    axes.set(xlabel="threshold", ylim=(0, 1.02), xlim=(0, 1), title=f"what a threshold gives, {target}s")
    axes.legend(frameon=False, fontsize=8)
    return svg_of(figure)


def new_axes(width: float = 6.5, height: float = 3.6) -> tuple[Any, Any]:
    """A new figure, sizes in inches, and its axes. Raises `MissingExtraError`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "eval") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg_of(figure: Any) -> str:
    """The figure as a reproducible SVG element."""
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.hashsalt": "guardreasoner-vl"}):  # otherwise SVG ids are random
        figure.savefig(stream, format="svg", metadata={"Date": None})
    content = stream.getvalue()
    return content[content.index("<svg") :]
