"""Write a corpus card: Markdown, an HTML page and figures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from guardreasoner_vl.corpus.stats import ALL, PARTS, Stats, quantiles
from guardreasoner_vl.corpus.store import SKIPPED, read_info
from guardreasoner_vl.errors import MissingExtraError
from guardreasoner_vl.evaluation.figures import OTHER, OWN, THIRD, new_axes, svg_of
from guardreasoner_vl.evaluation.report import NONE, html_page, markdown_page
from guardreasoner_vl.storage.atomic import write_text

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from guardreasoner_vl.corpus.store import CorpusInfo
    from guardreasoner_vl.evaluation.report import Table

PAPER = {
    "text": (63_799, 353_440, 5.54, 163.25),
    "image": (13_267, 57_322, 4.32, 154.03),
    "text-image": (46_030, 221_033, 4.80, 160.79),
    ALL: (123_096, 631_795, 5.13, 159.36),
}
"""Table 6 of the paper: rows, steps, mean steps per row, mean characters per step."""

_LABELS = ("harmful", "unharmful", "not labelled")
_COLOURS = {"harmful": THIRD, "unharmful": OWN, "not labelled": OTHER}


def write_card(folder: Path, stats: Stats, command: str) -> Path:
    """Write `card.md`, `card.html`, `stats.json` and, with the extra `data`, figures; return the card's path."""
    info = read_info(folder)
    title = f"Corpus {info.name}"
    try:
        figures = draw_stats(stats)
    except MissingExtraError:
        figures = {}
    for name, svg in figures.items():
        write_text(folder / f"{name}.svg", svg)
    listed = list(corpus_tables(stats, info, _skipped(folder)))
    notes = (
        f"Seed {info.seed}, {info.rows:,} rows. A row is harmful if its request or its response is. The first table is "
        "about training rows only."
    )
    write_text(folder / "stats.json", json.dumps(stats.as_json(), indent=1) + "\n")
    write_text(folder / "card.html", html_page(title, command, notes, listed, figures))
    card = folder / "card.md"
    write_text(card, markdown_page(title, command, notes, listed, [f"{name}.svg" for name in figures]))
    return card


def corpus_tables(stats: Stats, info: CorpusInfo, skipped: Mapping[str, int]) -> Iterable[tuple[str, Table]]:
    """All tables with their headings."""
    yield "Reasoning, beside the paper's Table 6", _steps_table(stats)
    yield "Sources", _sources_table(stats, info)
    yield "Labels", _counts_table(stats.labels)
    yield "Categories", [["", "rows"], *([name, f"{rows:,}"] for name, rows in stats.categories.most_common())]
    yield "Splits", [["", "rows"], *([name, f"{rows:,}"] for name, rows in stats.splits.items())]
    head = ["characters", "min", "median", "p95", "max"]
    lengths = {part: quantiles(stats.lengths[part]) for part in PARTS if stats.lengths[part]}
    yield "Lengths", [head, *([part, *(f"{value:,}" for value in row.values())] for part, row in lengths.items())]
    if skipped:
        yield "Skipped", [["reason", "rows"], *([reason, f"{rows:,}"] for reason, rows in skipped.items())]


def draw_stats(stats: Stats) -> dict[str, str]:
    """The figures as SVG texts, by name. Raises `MissingExtraError`."""
    figures = {"labels": _label_bars(stats.labels), "categories": _category_bars(stats.categories)}
    lengths = {part: stats.lengths[part] for part in PARTS if stats.lengths[part]}
    return {**figures, **({"lengths": _length_bars(lengths)} if lengths else {})}


def _steps_table(stats: Stats) -> Table:
    head = ["", "training rows", "with reasoning", "steps", "steps of a row", "characters of a step"]
    table = [[*head, *(f"paper: {name}" for name in ("rows", "steps", "steps of a row", "characters"))]]
    for name, counts in stats.modalities.items():
        rows, steps, mean, characters = PAPER[name]
        cells = [
            f"{counts.rows:,}",
            f"{counts.reasoned:,}",
            f"{counts.steps:,}",
            _mean(counts.mean_steps),
            _mean(counts.mean_characters),
        ]
        table.append([name, *cells, f"{rows:,}", f"{steps:,}", f"{mean:.2f}", f"{characters:.2f}"])
    return table


def _sources_table(stats: Stats, info: CorpusInfo) -> Table:
    known = {source.name: source for source in info.sources}
    table = [["", *_LABELS, "origin", "licence", "revision"]]
    for name, counts in sorted(stats.sources.items()):
        source = known.get(name)
        terms = (
            [source.origin, source.licence, source.revision or NONE] if source else ["made by this project", NONE, NONE]
        )
        table.append([name, *(f"{counts[label]:,}" for label in _LABELS), *terms])
    return table


def _counts_table(groups: Mapping[str, Counter[str]]) -> Table:
    return [["", *_LABELS], *([name, *(f"{counts[label]:,}" for label in _LABELS)] for name, counts in groups.items())]


def _mean(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _skipped(folder: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    if (folder / SKIPPED).is_file():
        for line in (folder / SKIPPED).read_text("utf-8").splitlines():
            reason = str(json.loads(line)["reason"])
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def _label_bars(groups: Mapping[str, Counter[str]]) -> str:
    figure, axes = new_axes(height=0.9 + 0.34 * len(groups))
    names = list(groups)[::-1]
    starts = [0] * len(names)
    for label in _LABELS:
        values = [groups[name][label] for name in names]
        axes.barh(names, values, left=starts, label=label, color=_COLOURS[label])
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    axes.set(xlabel="rows", title="labels")
    axes.legend(frameon=False, fontsize=8)
    return svg_of(figure)


def _category_bars(categories: Counter[str]) -> str:
    names = [name for name, _ in categories.most_common()][::-1]
    figure, axes = new_axes(height=0.9 + 0.26 * len(names))
    bars = axes.barh(names, [categories[name] for name in names], color=OWN)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.set(xlabel="rows", title="categories")
    axes.margins(x=0.12)
    return svg_of(figure)


def _length_bars(lengths: Mapping[str, list[int]]) -> str:
    figure, axes = new_axes()
    most = max(max(values) for values in lengths.values())
    edges = [0, *(2**power for power in range(3, most.bit_length() + 1))]
    for (part, values), colour in zip(lengths.items(), (OWN, THIRD, "#2d3640"), strict=False):
        axes.hist(values, bins=edges, histtype="step", label=part, color=colour, linewidth=1.5)
    axes.set_xscale("symlog", base=2, linthresh=8)
    axes.set(xlabel="characters", ylabel="rows", title="lengths")
    axes.legend(frameon=False, fontsize=8)
    return svg_of(figure)
