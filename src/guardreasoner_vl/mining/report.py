"""The report of a mining run: figures over all judged rows, their files, and the message if no row was kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.corpus.store import SKIPPED
from guardreasoner_vl.engines.faults import is_engine_fault
from guardreasoner_vl.evaluation.figures import OTHER, OWN, THIRD, new_axes, svg_of
from guardreasoner_vl.storage.atomic import write_json, write_text, write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from guardreasoner_vl.recipe import KeepRule, MineSection
    from guardreasoner_vl.sources.skipped import SkippedRows

REPORT, FIGURE = "mining.json", "pass_rates.svg"
_MOST_BARS = 40
_MORE = "a higher mine.temperature, more candidates or more rows"
_KEPT: dict[KeepRule, tuple[str, str, str]] = {
    "all_wrong": ("wrong answers only", "mixed", "a higher mine.temperature or more rows"),
    "mixed": ("right and wrong answers", "all_wrong", _MORE),
    "mostly_right": ("more right than wrong answers, and a wrong one", "mixed", _MORE),
}
"""Of each rule: the answers of the rows that it keeps, another rule, and how to get more such rows."""


@dataclass(frozen=True)
class MiningReport:
    """Figures of a mining run: `drawn` of the corpus's `rows` (split train) were selected, each `judged` or `failed`.

    `right[n]` counts the judged rows with n right candidates, `sources` the same for each source. `coverage` is the
    share of candidates inside the grammar, `tokens_mean` their mean completion tokens; None if no row was judged.
    """

    rows: int
    drawn: int
    judged: int
    kept: int
    failed: SkippedRows
    skipped: SkippedRows
    coverage: float | None
    tokens_mean: float | None
    right: tuple[int, ...]
    sources: dict[str, tuple[int, ...]]

    def as_json(self) -> dict[str, Any]:
        """Plain data; which rows failed or were skipped is left out."""
        return {**asdict(self), "failed": self.failed.reasons, "skipped": self.skipped.reasons}

    @property
    def unanswered(self) -> int:
        """The number of rows that the engine failed; the same command judges them again."""
        return unanswered(self.failed.reasons)


def unanswered(failed: Mapping[str, int]) -> int:
    """How many of the failed rows, counted by error code, failed because of the engine."""
    return sum(count for code, count in failed.items() if is_engine_fault(code))


def write_mining_report(out: Path, report: MiningReport) -> None:
    """Write the figures, their chart, and the ids of skipped and failed rows. Raises `MissingExtraError`."""
    write_json(out / REPORT, report.as_json())
    aside = (*report.skipped.rows, *report.failed.rows)
    if report.judged:
        write_text(out / FIGURE, pass_rates(report))
    write_whole(out / SKIPPED, (json.dumps({"id": row, "reason": reason}).encode() + b"\n" for row, reason in aside))


def why_nothing(report: MiningReport, section: MineSection, last_fault: str) -> str:
    """Why no row was kept, and what to change."""
    if not report.judged:
        return f"none of {report.drawn:,} rows could be judged ({last_fault}); fix that and mine again"
    wanted, other, remedy = _KEPT[section.keep]
    return f"none of {report.judged:,} rows has {wanted}; set mine.keep: {other}, or use a new --out with {remedy}"


def pass_rates(report: MiningReport) -> str:
    """The shares of rows with 0 to k right candidates, by source, as an SVG. Raises `MissingExtraError`."""
    largest = sorted(report.sources.items(), key=lambda item: -sum(item[1]))[:_MOST_BARS]
    bars = [("all", report.right), *largest]
    figure, axes = new_axes(height=1.5 + 0.34 * len(bars))
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("", (THIRD, OTHER, OWN), N=len(report.right))
    places = range(len(bars))[::-1]
    offsets = [0.0] * len(bars)
    for number in range(len(report.right)):
        values = [100 * counts[number] / sum(counts) for _, counts in bars]
        axes.barh(places, values, left=offsets, label=str(number), color=colours(number))
        offsets = [start + value for start, value in zip(offsets, values, strict=True)]
    axes.set_yticks(places, [f"{name} ({sum(counts):,})" for name, counts in bars], parse_math=False)
    axes.set(xlim=(0, 100), xlabel="rows, percent", title=f"right answers of {len(report.right) - 1}")
    figure.legend(loc="outside lower center", ncols=min(len(report.right), 9), frameon=False, fontsize=8)
    return svg_of(figure)
