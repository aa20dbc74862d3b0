"""A guard's figures as a table and a file, and the checks whether they are good enough."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from math import hypot
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.report import NONE, markdown_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.quality.measures import Measure
    from guardreasoner_vl.evaluation.report import Table
    from guardreasoner_vl.types import ModelInfo

BOUNDS = Path(__file__).with_name("bounds.json")
"""Bounds of the quick part for the shipped guard, by the measure's name, in percent."""


@dataclass(frozen=True)
class Earlier:
    """An earlier guard's figure and its noise."""

    value: float
    noise: float


@dataclass
class Report:
    """All figures of one guard; `kinds` counts [wrong, all] by list, mode and kind, `tables` are by set."""

    guard: ModelInfo
    quick: bool
    measures: list[Measure] = field(default_factory=list)
    kinds: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain data, for `--out`."""
        content = asdict(self)
        return {**content, "guard": self.guard.model_dump()}


def earlier_figures(path: Path, quick: bool) -> dict[str, Earlier]:
    """The figures of a file that `--out` wrote. Raises `DataError`, also if it is of the other part of the gate."""
    try:
        content = json.loads(path.read_text("utf-8"))
        figures = {
            row["name"]: Earlier(float(row["value"]), float(row["noise"]))
            for row in content["measures"]
            if row["value"] is not None
        }
        same_part = content["quick"] is quick
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: no figures of a guard in it; give a file that --out wrote") from error
    if not same_part:
        raise DataError(f"{path}: its rows are not these; run both with --quick, or both without")
    return figures


def with_bounds(measures: Sequence[Measure], path: Path = BOUNDS) -> list[Measure]:
    """The measures with the bounds in the file as wanted values. Raises `DataError` for a measure without one."""
    try:
        bounds: dict[str, float] = json.loads(path.read_text("utf-8"))
        return [replace(measure, wanted=float(bounds[measure.name])) for measure in measures]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: no bounds in it; give a JSON object of numbers") from error
    except KeyError as error:
        raise DataError(f"{path}: no bound for {error}; add one") from error


def is_behind(measure: Measure, earlier: Earlier | None) -> bool:
    """Whether the figure is worse than the earlier guard's by more than both figures' noise together."""
    if earlier is None:
        return False
    if measure.value is None:
        return True
    worse = earlier.value - measure.value if measure.higher_is_better else measure.value - earlier.value
    return worse > hypot(measure.noise, earlier.noise)


def failures(measures: Sequence[Measure], earlier: Mapping[str, Earlier], demand: bool) -> list[str]:
    """One line per failure: figures behind the earlier guard's and, with `demand`, figures that miss a wanted value."""
    lines = []
    for measure in measures:
        before = earlier.get(measure.name)
        if before is not None and is_behind(measure, before):
            lines.append(
                f"{measure.name}: {_number(measure.value)}, behind the earlier guard's {_number(before.value)}"
            )
        if demand and measure.meets is False:
            lines.append(f"{measure.name}: {_number(measure.value)}, {_wanted(measure)} is wanted")
    measured = {measure.name for measure in measures}
    return lines + [
        f"{name}: not measured, the earlier guard's was; give the same --data and --modes"
        for name in earlier
        if name not in measured
    ]


def table(measures: Sequence[Measure], earlier: Mapping[str, Earlier]) -> Table:
    """One line for each measure."""
    lines = [["", "value", "+-", "rows", "wanted", "earlier", ""]]
    for measure in measures:
        before = earlier.get(measure.name)
        status = "behind" if is_behind(measure, before) else {True: "pass", False: "miss", None: ""}[measure.meets]
        numbers = [_number(measure.value), f"{measure.noise:.1f}", f"{measure.rows:,}"]
        lines.append([measure.name, *numbers, _wanted(measure), _number(before.value if before else None), status])
    return lines


def report_text(report: Report, earlier: Mapping[str, Earlier]) -> str:
    """The report as text."""
    parts = [f"guard: {report.guard.name} {report.guard.revision or ''}".strip()]
    parts.append(markdown_table(table(report.measures, earlier)))
    parts += [f"{heading}:\n{markdown_table(lines)}" for heading, lines in report.tables.items()]
    for name, kinds in report.kinds.items():
        wrong = ", ".join(f"{kind} {part} of {whole}" for kind, (part, whole) in kinds.items() if part)
        if wrong:
            parts.append(f"wrong, {name}: {wrong}")
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _wanted(measure: Measure) -> str:
    if measure.wanted is None:
        return ""
    return f"{'at least' if measure.higher_is_better else 'at most'} {measure.wanted:g}"
