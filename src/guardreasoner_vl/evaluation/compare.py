"""Evaluations beside each other: a leaderboard, and whether two guards differ by more than chance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.intervals import McNemar, mcnemar
from guardreasoner_vl.evaluation.predictions import PREDICTIONS, SETTINGS, Prediction, read_predictions
from guardreasoner_vl.evaluation.report import NONE, markdown_table, percent
from guardreasoner_vl.evaluation.results import TARGETS, Results, Settings, judgement, summarise, truth

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from guardreasoner_vl.evaluation.report import Table
    from guardreasoner_vl.types import Target


@dataclass(frozen=True)
class Evaluation:
    """One folder that `evaluate` wrote."""

    name: str
    rows: list[Prediction]
    results: Results


def read_evaluation(folder: Path) -> Evaluation:
    """Raises `DataError` if the folder holds no evaluation."""
    try:
        settings = Settings(**json.loads((folder / SETTINGS).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder}: no evaluation in it; give a folder that `evaluate --out` wrote") from error
    rows = list(read_predictions(folder / PREDICTIONS))
    return Evaluation(f"{settings.model}, {settings.mode} ({folder.name})", rows, summarise(rows, settings, {}))


def leaderboard(evaluations: Sequence[Evaluation], target: Target) -> Table:
    """F1 by benchmark, the best over all rows first, with coverage and what an answer takes."""
    names = list(dict.fromkeys(row.benchmark for one in evaluations for row in one.rows if truth(row, target)))
    table = [["", *names, "all rows", "FPR", "coverage", "tokens, mean"]]
    lines: list[tuple[float, list[str]]] = []
    for one in evaluations:
        groups = one.results.groups.get(target, {})
        if "all" not in groups:
            continue
        figures = groups["all"].figures
        cells = [percent(groups[name].figures.counts.f1) if name in groups else NONE for name in (*names, "all")]
        rates = [percent(figures.counts.false_positive_rate), percent(figures.counts.coverage)]
        lines.append((figures.counts.f1 or 0, [one.name, *cells, *rates, f"{figures.completion_tokens_mean:.1f}"]))
    return table + [cells for _, cells in sorted(lines, key=lambda line: -line[0])]


def difference(first: Evaluation, second: Evaluation, target: Target) -> tuple[int, McNemar]:
    """The rows that both judged, and McNemar's test on them."""
    rights = [
        {
            (row.benchmark, row.id): judgement(row, target).label == gold
            for row in one.rows
            if (gold := truth(row, target)) is not None
        }
        for one in (first, second)
    ]
    shared = [key for key in rights[0] if key in rights[1]]
    return len(shared), mcnemar([rights[0][key] for key in shared], [rights[1][key] for key in shared])


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """The leaderboard of each target, and every evaluation against the first one."""
    parts = ["# Guards compared", "F1 and rates in percent; harmful is the positive class."]
    for target in TARGETS:
        board = leaderboard(evaluations, target)
        if len(board) == 1:
            continue
        parts += [f"## {target.capitalize()}s", markdown_table(board)]
        table = [["against", evaluations[0].name, "shared rows", "only the first right", "only this right", "p"]]
        for one in evaluations[1:]:
            rows, test = difference(evaluations[0], one, target)
            table.append(
                [one.name, "", f"{rows:,}", f"{test.only_first:,}", f"{test.only_second:,}", f"{test.p_value:.2g}"]
            )
        if len(table) > 1:
            parts += ["McNemar's exact test, two-sided:", markdown_table(table)]
    return "\n\n".join(parts) + "\n"
