"""Compare evaluations: a leaderboard, a table of all benchmarks, and McNemar's test between two guards."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.intervals import McNemar, mcnemar
from guardreasoner_vl.evaluation.metrics import Counts
from guardreasoner_vl.evaluation.predictions import PREDICTIONS, RESULTS, SETTINGS, Prediction, read_predictions
from guardreasoner_vl.evaluation.report import NONE, markdown_table, percent
from guardreasoner_vl.evaluation.results import (
    ALL,
    CATEGORY,
    Results,
    Settings,
    judgement,
    summarise,
    truth,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from guardreasoner_vl.evaluation.report import Table
    from guardreasoner_vl.types import Target


@dataclass(frozen=True)
class Evaluation:
    """The contents of one folder that `evaluate` wrote."""

    name: str
    rows: list[Prediction]
    results: Results


def read_evaluation(folder: Path) -> Evaluation:
    """Read a folder. Raises `DataError` if it holds no evaluation. An unfinished one has no baselines."""
    try:
        settings = Settings(**json.loads((folder / SETTINGS).read_text("utf-8")))
        finished = (folder / RESULTS).is_file()
        stored: dict[str, Any] = json.loads((folder / RESULTS).read_text("utf-8")) if finished else {}
        excluded: Sequence[str] = stored["excluded"] if finished else ()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder}: no evaluation in it; give a folder that `evaluate --out` wrote") from error
    rows = list(read_predictions(folder / PREDICTIONS))
    results = summarise(rows, settings, {}, excluded)
    for target, groups in stored.get("groups", {}).items():
        for name, group in groups.items():
            counted = {guard: Counts(**cells) for guard, cells in group["baselines"].items()}
            results.groups[target][name] = replace(results.groups[target][name], baselines=counted)
    return Evaluation(f"{settings.model}, {settings.mode} ({folder.name})", rows, results)


def leaderboard(evaluations: Sequence[Evaluation], target: Target) -> Table:
    """One line per guard, over all its rows, the best F1 first."""
    ranked = [
        (each.name, groups[ALL].figures) for each in evaluations if ALL in (groups := each.results.groups[target])
    ]
    ranked.sort(key=lambda line: -(line[1].counts.f1 or 0))
    return [
        ["", "F1", "FPR", "coverage", "tokens, mean", "rows"],
        *(
            [
                name,
                percent(figures.counts.f1),
                percent(figures.counts.false_positive_rate),
                percent(figures.counts.coverage),
                f"{figures.completion_tokens_mean:.1f}",
                f"{figures.rows:,}",
            ]
            for name, figures in ranked
        ),
    ]


def by_group(evaluations: Sequence[Evaluation], target: Target) -> Table:
    """One line for all rows, each benchmark and each modality, with F1 / FPR of every guard and baseline."""
    names = dict.fromkeys(name for one in evaluations for name in one.results.groups[target])
    excluded = {name for one in evaluations for name in one.results.excluded}
    groups = {name: [one.results.groups[target].get(name) for one in evaluations] for name in names}
    baselines = dict.fromkeys(guard for parts in groups.values() for part in parts if part for guard in part.baselines)
    head = [f"{name} F1 / FPR" for name in (*(one.name for one in evaluations), *baselines)]
    table = [["", "rows", "harmful", *head, "coverage"]]
    for name, parts in groups.items():
        if name.startswith(CATEGORY):
            continue
        first = next(part for part in parts if part)
        counts = [part.figures.counts if part else None for part in parts]
        rows, harmful = first.figures.rows, first.figures.counts.true_positive + first.figures.counts.false_negative
        table.append(
            [f"{name} (excluded)" if name in excluded else name, f"{rows:,}", f"{harmful:,}"]
            + [_both(one) for one in (*counts, *(first.baselines.get(guard) for guard in baselines))]
            + [" / ".join(percent(one.coverage) if one else NONE for one in counts)]
        )
    return table


def _both(counts: Counts | None) -> str:
    return f"{percent(counts.f1)} / {percent(counts.false_positive_rate)}" if counts else NONE


def difference(first: Evaluation, second: Evaluation, target: Target) -> tuple[int, McNemar]:
    """The number of rows that both judged, without excluded benchmarks, and McNemar's test on them."""
    excluded = {*first.results.excluded, *second.results.excluded}
    rights = [
        {
            (row.benchmark, row.id): judgement(row, target).label == gold
            for row in evaluation.rows
            if (gold := truth(row, target)) is not None and row.benchmark not in excluded
        }
        for evaluation in (first, second)
    ]
    shared = [key for key in rights[0] if key in rights[1]]
    return len(shared), mcnemar([rights[0][key] for key in shared], [rights[1][key] for key in shared])


def comparison_markdown(evaluations: Sequence[Evaluation]) -> str:
    """For each target: the leaderboard, the tests against the first evaluation, and the table of benchmarks."""
    parts = ["# Guards compared", "F1 and rates in percent; harmful is the positive class."]
    for target in TARGETS:
        board = leaderboard(evaluations, target)
        if len(board) == 1:
            continue
        parts += [f"## {target.capitalize()}s", markdown_table(board)]
        table = [["against", evaluations[0].name, "shared rows", "only the first right", "only this right", "p"]]
        for other in evaluations[1:]:
            rows, test = difference(evaluations[0], other, target)
            table.append(
                [other.name, "", f"{rows:,}", f"{test.only_first:,}", f"{test.only_second:,}", f"{test.p_value:.2g}"]
            )
        if len(table) > 1:
            parts += ["McNemar's exact test, two-sided:", markdown_table(table)]
        parts.append(markdown_table(by_group(evaluations, target)))
    return "\n\n".join(parts) + "\n"
