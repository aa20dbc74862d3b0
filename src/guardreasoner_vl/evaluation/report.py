"""Reports of evaluations: tables, a Markdown report, and a self-contained HTML page.

Where a benchmark is one of the paper's, the paper's published figures are shown with the guard's.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.errors import MissingExtraError
from guardreasoner_vl.evaluation.published import averages, published_f1, sizes
from guardreasoner_vl.evaluation.results import CATEGORY, MODALITY
from guardreasoner_vl.evaluation.rules import RULES
from guardreasoner_vl.judging.calibration import PRESETS
from guardreasoner_vl.storage.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from guardreasoner_vl.choices import RuleName
    from guardreasoner_vl.evaluation.intervals import Interval
    from guardreasoner_vl.evaluation.predictions import Prediction
    from guardreasoner_vl.evaluation.published import Task
    from guardreasoner_vl.evaluation.results import GroupResults, Results
    from guardreasoner_vl.evaluation.rules import ScoredAnswer
    from guardreasoner_vl.judging.calibration import Calibration
    from guardreasoner_vl.types import Target

NONE = "\u2013"
TASKS: dict[Target, Task] = {"request": "prompt", "response": "response"}
Table = list[list[str]]
"""Rows of cells; the first row is the heading."""


def percent(value: float | None) -> str:
    """A share in percent with one decimal, or a dash for None."""
    return NONE if value is None else f"{100 * value:.1f}"


def quality_table(groups: Mapping[str, GroupResults]) -> Table:
    """F1 and other rates with their intervals, and F1 / FPR of the baselines."""
    baselines = sorted({name for group in groups.values() for name in group.baselines})
    table = [
        ["", "rows", "harmful", "F1 (95%)", "precision", "recall", "FPR (95%)", "accuracy", "coverage"]
        + [f"{name} F1 / FPR" for name in baselines]
    ]
    for name, group in groups.items():
        figures, counts = group.figures, group.figures.counts
        table.append(
            [
                name,
                f"{counts.total:,}",
                f"{counts.true_positive + counts.false_negative:,}",
                _with(counts.f1, figures.f1_interval),
                percent(counts.precision),
                percent(counts.recall),
                _with(counts.false_positive_rate, figures.false_positive_rate_interval),
                percent(counts.accuracy),
                percent(counts.coverage),
            ]
            + [
                f"{percent(other.f1)} / {percent(other.false_positive_rate)}" if other else NONE
                for other in (group.baselines.get(baseline) for baseline in baselines)
            ]
        )
    return table


def ranking_table(groups: Mapping[str, GroupResults]) -> Table:
    """Ranking and calibration of the scores, and the cost of the answers."""
    head = ["", "scored", "AUPRC", "AUROC", "recall at 1% FPR", "recall at 5% FPR", "ECE"]
    table = [[*head, "tokens, mean", "tokens, p95", "seconds"]]
    for name, group in groups.items():
        figures = group.figures
        table.append(
            [
                name,
                f"{figures.scored:,}",
                percent(figures.auprc),
                percent(figures.auroc),
                percent(figures.recall_at_1_percent),
                percent(figures.recall_at_5_percent),
                percent(figures.calibration_error),
                f"{figures.completion_tokens_mean:.1f}",
                f"{figures.completion_tokens_p95:.0f}",
                f"{figures.seconds:.1f}",
            ]
        )
    return table


def paper_f1(results: Results, target: Target) -> dict[str, float | None]:
    """F1 in percent by the paper's benchmark names, with its averages; empty if none was evaluated."""
    task = TASKS[target]
    groups = results.groups.get(target, {})
    f1_values: dict[str, float | None] = {}
    for size in sizes():
        if size.task == task and size.file in groups:
            f1 = groups[size.file].figures.counts.f1
            f1_values[size.benchmark] = None if f1 is None else 100 * f1
    return f1_values | averages(task, f1_values) if f1_values else {}


def paper_table(results: Results, target: Target) -> Table:
    """The paper's table with this guard's row last; empty if none of its benchmarks was evaluated."""
    measured = paper_f1(results, target)
    if not measured:
        return []
    table = [["F1", *measured]]
    rows = {**published_f1(TASKS[target]), f"**{results.settings.model}, {results.settings.mode}**": measured}
    for model, cells in rows.items():
        values = (cells.get(name) for name in measured)
        table.append([model, *(NONE if value is None else f"{value:.2f}" for value in values)])
    return table


def report_tables(results: Results) -> Iterable[tuple[str, Table]]:
    """The tables of a report with their headings."""
    for target in TARGETS:
        groups = results.groups.get(target, {})
        if not groups:
            continue
        whole = {name: group for name, group in groups.items() if not name.startswith((MODALITY, CATEGORY))}
        parts = {name: group for name, group in groups.items() if name not in whole}
        yield f"{target.capitalize()}s", quality_table(whole)
        yield f"{target.capitalize()}s: scores and cost", ranking_table(whole)
        if len(parts) > 1:
            yield f"{target.capitalize()}s by modality and category", quality_table(parts)
        if paper := paper_table(results, target):
            yield f"{target.capitalize()}s beside the paper (Table {1 if target == 'request' else 2})", paper


def report_markdown(results: Results, command: str, figures: Sequence[str] = ()) -> str:
    """The report as Markdown; `figures` are file names in the same folder."""
    return markdown_page(_title(results), command, _notes(results), report_tables(results), figures)


def markdown_page(
    title: str, command: str, notes: str, tables: Iterable[tuple[str, Table]], figures: Sequence[str]
) -> str:
    """Notes, figures (file names) and tables as Markdown."""
    parts = [f"# {title}", f"Made by `{command}`.", notes]
    parts += [f"![{name.removesuffix('.svg').replace('_', ' ')}]({name})" for name in figures]
    for heading, table in tables:
        parts += [f"## {heading}", markdown_table(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(table: Table) -> str:
    """The table as Markdown."""
    head, *rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows])


def page(results: Results, command: str, figures: Mapping[str, str] | None = None) -> str:
    """The report as HTML; `figures` are SVG texts by name, which are embedded."""
    return html_page(_title(results), command, _notes(results), report_tables(results), figures or {})


def html_page(
    title: str, command: str, notes: str, tables: Iterable[tuple[str, Table]], figures: Mapping[str, str]
) -> str:
    """Notes, figures and tables as one self-contained HTML page."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>Made by <code>{html.escape(command)}</code>.</p>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in notes.splitlines() if line]
    for name, svg in figures.items():
        parts.append(f"<figure>{svg}<figcaption>{html.escape(name)}</figcaption></figure>")
    for heading, table in tables:
        parts += [f"<h2>{html.escape(heading)}</h2>", _html_table(table)]
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def _html_table(table: Table) -> str:
    head, *rows = table
    lines = ["<table>", "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        css_class = ' class="own"' if row[0].startswith("**") else ""
        lines.append(f"<tr{css_class}>" + "".join(f"<td>{html.escape(cell.strip('*'))}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _title(results: Results) -> str:
    settings = results.settings
    revision = f" ({settings.revision})" if settings.revision else ""
    return f"{settings.model}{revision}, {settings.mode} mode"


def _notes(results: Results) -> str:
    lines = [
        "Harmful is the positive class; percent. An answer that cannot be parsed counts as one error. Intervals are "
        "95% bootstrap intervals; ECE is the expected calibration error of the scores."
    ]
    if results.excluded:
        lines.append(f"Excluded from every figure but the benchmark's own line: {', '.join(results.excluded)}.")
    lines += [f"Note: {warning}." for warning in results.warnings]
    for name, reasons in results.skipped.items():
        counted = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        lines.append(f"Skipped in {name}: {counted}.")
    return "\n\n".join(lines)


def _with(value: float | None, interval: Interval | None) -> str:
    if value is None or interval is None:
        return percent(value)
    return f"{percent(value)} ({percent(interval.low)}\u2013{percent(interval.high)})"


def score_table(rows: Sequence[ScoredAnswer], rule: RuleName) -> Table:
    """One line per labelled target; `counted` is the number of (row, answer) pairs that the rule counts."""
    table = [["", "labelled", "counted", "F1", "precision", "recall", "FPR", "accuracy", "coverage"]]
    for target in TARGETS:
        labelled = sum(row.truth(target) is not None for row in rows)
        if not labelled:
            continue
        counts = RULES[rule](rows, target)
        rates = (
            counts.f1,
            counts.precision,
            counts.recall,
            counts.false_positive_rate,
            counts.accuracy,
            counts.coverage,
        )
        table.append([target, f"{labelled:,}", f"{counts.total:,}", *map(percent, rates)])
    return table


def calibration_table(calibration: Calibration) -> Table:
    """One line per fitted mode and target."""
    table = [["", "rows", "temperature", "ECE before", "ECE after", *PRESETS]]
    for mode, scales in (("fast", calibration.fast), ("slow", calibration.slow)):
        for target, scale in (("request", scales.request), ("response", scales.response)):
            if scale.measured is None:
                continue
            measured = scale.measured
            errors = (percent(measured.error_before), percent(measured.error_after))
            cutoffs = (f"{scale.thresholds[preset]:.3f}" for preset in PRESETS)
            table.append([f"{mode} {target}", f"{measured.rows:,}", f"{scale.temperature:.2f}", *errors, *cutoffs])
    return table


def write_report(results: Results, rows: Sequence[Prediction], out: Path, command: str) -> str | None:
    """Write `report.md`, `report.html` and the figures; return why there are no figures, None if there are."""
    figures: dict[str, str] = {}
    reason = None
    try:
        from guardreasoner_vl.evaluation.figures import draw_results

        figures = draw_results(results, rows)
    except MissingExtraError as error:
        reason = f"no figures: {error}"
    names = []
    for name, svg in figures.items():
        names.append(f"{name}.svg")
        write_text(out / names[-1], svg)
    write_text(out / "report.md", report_markdown(results, command, names))
    write_text(out / "report.html", page(results, command, figures))
    return reason


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1d2733; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }}
th, td {{ padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #dfe4ea; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.own td {{ font-weight: 600; background: #f2f6fc; }}
figure {{ margin: 1rem 0; }} figure svg {{ max-width: 100%; height: auto; }} figcaption {{ color: #5b6773; }}
</style></head><body>
{body}
</body></html>
"""
