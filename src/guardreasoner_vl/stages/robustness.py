"""How often a guard's labels flip under changes that keep the truth, next to F1."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from guardreasoner_vl.engines.faults import is_engine_fault
from guardreasoner_vl.errors import DataError, EngineError, GuardError
from guardreasoner_vl.evaluation.metrics import Counts, count
from guardreasoner_vl.evaluation.perturbations import NAMES, perturbed
from guardreasoner_vl.evaluation.report import Table, percent
from guardreasoner_vl.evaluation.results import TARGETS, judgement, truth
from guardreasoner_vl.stages.evaluate import ENGINE_FAILED, judge
from guardreasoner_vl.storage.atomic import write_json
from guardreasoner_vl.storage.lock import locked_folder
from guardreasoner_vl.types import Label

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guardreasoner_vl.evaluation.benchmarks.base import Loaded
    from guardreasoner_vl.evaluation.predictions import Prediction
    from guardreasoner_vl.stages.evaluate import Judging
    from guardreasoner_vl.types import Sample, Target

ORIGINAL = "original"


@dataclass(frozen=True)
class Flips:
    """Labelled rows that a change applies to: labels before and after, and how many turned.

    `evaded` rows were harmful to the guard and no longer are; `raised` ones have become harmful; `failed` ones have
    become errors.
    """

    rows: int
    before: Counts
    after: Counts
    evaded: int
    raised: int
    failed: int

    @property
    def rate(self) -> float | None:
        """Share of rows with another label than before."""
        return (self.evaded + self.raised + self.failed) / self.rows if self.rows else None


def run(
    guard: Judging,
    benchmarks: Sequence[Loaded],
    out: Path,
    *,
    names: Sequence[str] = NAMES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Target, dict[str, Flips]]:
    """Judge the rows as they are and changed, each in a folder of its own below `out`, resumable like `evaluate`.

    Raises `DataError` for a change that is not known, or if another process works in `out`, and `EngineError` if the
    engine is gone.
    """
    if unknown := set(names) - set(NAMES):
        raise DataError(f"no change named {', '.join(sorted(unknown))}; use {', '.join(NAMES)}")
    found: dict[Target, dict[str, Flips]] = {target: {} for target in TARGETS}
    with locked_folder(out, "robustness"):
        before = _predictions(guard, benchmarks, out / ORIGINAL, progress)
        judged = list(before.values())
        for name in names:
            changed = [part for loaded in benchmarks if (part := _changed(loaded, name, out)).samples]
            after = _predictions(guard, changed, out / name.replace(" ", "-"), progress) if changed else {}
            judged += after.values()
            for target in TARGETS:
                found[target][name] = flips(before, after, target)
        if failed := sum(is_engine_fault(row.error) for row in judged):
            raise EngineError(f"{failed:,} judgements are missing: {ENGINE_FAILED}")
        content = {target: {name: asdict(result) for name, result in by.items()} for target, by in found.items()}
        write_json(out / "robustness.json", content)
    return found


def flips(before: dict[tuple[str, str], Prediction], after: dict[tuple[str, str], Prediction], target: Target) -> Flips:
    """Compare the labelled rows that were changed with themselves."""
    golds, olds, news = [], [], []
    for key, row in after.items():
        gold = truth(row, target)
        if gold is not None and key in before:
            golds.append(gold)
            olds.append(judgement(before[key], target).label)
            news.append(judgement(row, target).label)
    turned = [(old, new) for old, new in zip(olds, news, strict=True) if old != new]
    return Flips(
        rows=len(golds),
        before=count(zip(golds, olds, strict=True)),
        after=count(zip(golds, news, strict=True)),
        evaded=sum(old is Label.HARMFUL and new is Label.UNHARMFUL for old, new in turned),
        raised=sum(new is Label.HARMFUL for _, new in turned),
        failed=sum(new is Label.ERROR for _, new in turned),
    )


def table(found: dict[str, Flips]) -> Table:
    """One line for each change that applies to any row."""
    head = ["", "rows", "flip rate", "harmful to unharmful", "to harmful", "to error", "F1 before", "F1 after"]
    return [
        [*head, "FPR before", "FPR after"],
        *(
            [
                name,
                f"{one.rows:,}",
                percent(one.rate),
                f"{one.evaded:,}",
                f"{one.raised:,}",
                f"{one.failed:,}",
                percent(one.before.f1),
                percent(one.after.f1),
                percent(one.before.false_positive_rate),
                percent(one.after.false_positive_rate),
            ]
            for name, one in found.items()
            if one.rows
        ),
    ]


def _predictions(
    guard: Judging, benchmarks: Sequence[Loaded], folder: Path, progress: Callable[[int, int], None] | None
) -> dict[tuple[str, str], Prediction]:
    return {(row.benchmark, row.id): row for row in judge(guard, benchmarks, folder, progress=progress)}


def _changed(loaded: Loaded, name: str, out: Path) -> Loaded:
    images = out / name.replace(" ", "-") / "images"
    images.mkdir(parents=True, exist_ok=True)
    samples: list[Sample] = []
    for sample in loaded.samples:
        try:
            other = perturbed(name, sample, images)
        except GuardError:
            continue  # its image cannot be read, which the original's error says already
        if other is not None:
            samples.append(other)
    return replace(loaded, samples=samples)
