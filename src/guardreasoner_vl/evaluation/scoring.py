"""Counts and calibrations as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.evaluation.report import percent
from guardreasoner_vl.evaluation.results import TARGETS
from guardreasoner_vl.evaluation.rules import RULES
from guardreasoner_vl.judging.calibration import PRESETS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.evaluation.report import Table
    from guardreasoner_vl.evaluation.rules import Answered, RuleName
    from guardreasoner_vl.judging.calibration import Calibration


def score_table(rows: Sequence[Answered], rule: RuleName) -> Table:
    """One line for each target that is labelled; `counted` is how many (row, answer) pairs the rule counts."""
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
    """One line for each mode and target that was fitted."""
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
