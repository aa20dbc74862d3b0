"""Robustness: how often a guard's labels flip under perturbations that keep the gold label, and F1 before and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.engines.faults import is_engine_fault
from guardreasoner_vl.errors import DataError, EngineError, GuardError
from guardreasoner_vl.evaluation.metrics import Counts, count
from guardreasoner_vl.evaluation.perturbations import NAMES, perturbed
from guardreasoner_vl.evaluation.report import Table, percent
from guardreasoner_vl.evaluation.results import judgement, truth
from guardreasoner_vl.stages.evaluate import ENGINE_FAILED, judge_rows
from guardreasoner_vl.storage.atomic import write_json
from guardreasoner_vl.storage.lock import locked_folder
from guardreasoner_vl.types import Label

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark
    from guardreasoner_vl.evaluation.predictions import Prediction
    from guardreasoner_vl.guard import Moderator
    from guardreasoner_vl.types import Exchange, Sample, Target

ORIGINAL = "original"


@dataclass(frozen=True)
class Flips:
    """Counts over the labelled rows that a perturbation applies to, before and after it.

    The guard's label flipped from harmful to unharmful in `evaded` rows, to harmful in `raised` rows and to an error in
    `failed` rows.
    """

    rows: int
    before: Counts
    after: Counts
    evaded: int
    raised: int
    failed: int

    @property
    def rate(self) -> float | None:
        """Share of rows whose label flipped; None without rows."""
        return (self.evaded + self.raised + self.failed) / self.rows if self.rows else None


def run(
    guard: Moderator[Exchange],
    benchmarks: Sequence[LoadedBenchmark],
    out: Path,
    *,
    names: Sequence[str] = NAMES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Target, dict[str, Flips]]:
    """Judge the original rows and each perturbation of them; every set resumes in its own folder below `out`.

    Raises `DataError` for an unknown perturbation, or if another process works in `out`, and `EngineError` if the
    engine failed rows.
    """
    if unknown := set(names) - set(NAMES):
        raise DataError(f"no change named {', '.join(sorted(unknown))}; use {', '.join(NAMES)}")
    results: dict[Target, dict[str, Flips]] = {target: {} for target in TARGETS}
    with locked_folder(out, "robustness"):
        before = _predictions(guard, benchmarks, out / ORIGINAL, progress)
        judged = list(before.values())
        for name in names:
            changed = [part for loaded in benchmarks if (part := _perturbed_benchmark(loaded, name, out)).samples]
            after = _predictions(guard, changed, out / name.replace(" ", "-"), progress) if changed else {}
            judged += after.values()
            for target in TARGETS:
                results[target][name] = flips(before, after, target)
        if failed := sum(is_engine_fault(row.error) for row in judged):
            raise EngineError(f"{failed:,} judgements are missing: {ENGINE_FAILED}")
        content = {target: {name: asdict(result) for name, result in by.items()} for target, by in results.items()}
        write_json(out / "robustness.json", content)
    return results


def flips(before: dict[tuple[str, str], Prediction], after: dict[tuple[str, str], Prediction], target: Target) -> Flips:
    """Compare the labels of each perturbed row with those of its original."""
    golds, olds, news = [], [], []
    for key, row in after.items():
        gold = truth(row, target)
        if gold is not None and key in before:
            golds.append(gold)
            olds.append(judgement(before[key], target).label)
            news.append(judgement(row, target).label)
    flipped = [(old, new) for old, new in zip(olds, news, strict=True) if old != new]
    return Flips(
        rows=len(golds),
        before=count(zip(golds, olds, strict=True)),
        after=count(zip(golds, news, strict=True)),
        evaded=sum(old is Label.HARMFUL and new is Label.UNHARMFUL for old, new in flipped),
        raised=sum(new is Label.HARMFUL for _, new in flipped),
        failed=sum(new is Label.ERROR for _, new in flipped),
    )


def flips_table(results: dict[str, Flips]) -> Table:
    """One line for each perturbation that applies to any row."""
    head = ["", "rows", "flip rate", "harmful to unharmful", "to harmful", "to error", "F1 before", "F1 after"]
    return [
        [*head, "FPR before", "FPR after"],
        *(
            [
                name,
                f"{result.rows:,}",
                percent(result.rate),
                f"{result.evaded:,}",
                f"{result.raised:,}",
                f"{result.failed:,}",
                percent(result.before.f1),
                percent(result.after.f1),
                percent(result.before.false_positive_rate),
                percent(result.after.false_positive_rate),
            ]
            for name, result in results.items()
            if result.rows
        ),
    ]


def _predictions(
    guard: Moderator[Exchange],
    benchmarks: Sequence[LoadedBenchmark],
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> dict[tuple[str, str], Prediction]:
    return {(row.benchmark, row.id): row for row in judge_rows(guard, benchmarks, folder, progress=progress)}


def _perturbed_benchmark(loaded: LoadedBenchmark, name: str, out: Path) -> LoadedBenchmark:
    images = out / name.replace(" ", "-") / "images"
    images.mkdir(parents=True, exist_ok=True)
    samples: list[Sample] = []
    for sample in loaded.samples:
        try:
            changed = perturbed(name, sample, images)
        except GuardError:
            continue  # its image cannot be read, which the original row's error reports already
        if changed is not None:
            samples.append(changed)
    return replace(loaded, samples=samples)
