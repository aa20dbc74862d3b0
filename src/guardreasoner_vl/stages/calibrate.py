"""Calibration: judge labelled rows in both modes, then fit temperatures, thresholds and the hybrid band."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from guardreasoner_vl.engines.faults import is_engine_fault
from guardreasoner_vl.errors import EngineError, InputError
from guardreasoner_vl.evaluation.calibrate import BALANCED, fit
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.judging.calibration import PRESETS
from guardreasoner_vl.stages.evaluate import ENGINE_FAILED, judge_rows
from guardreasoner_vl.storage.atomic import write_json
from guardreasoner_vl.storage.lock import locked_folder, sweep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark
    from guardreasoner_vl.evaluation.predictions import Prediction
    from guardreasoner_vl.judging.calibration import Calibration
    from guardreasoner_vl.types import Mode


def run(
    guard: Guard,
    benchmarks: Sequence[LoadedBenchmark],
    out: Path,
    *,
    reasoned: float = 0.3,
    false_alarms: tuple[float, float] = BALANCED,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Write the calibration to `out`; the predictions are kept in `OUT.rows`, so that a stopped run resumes.

    `reasoned` is the share of rows that hybrid mode reasons about; `false_alarms` has the false-positive rates of the
    preset `balanced`, for requests and for responses. Raises `DataError` if there are too few rows or another process
    works there, `InputError` for a share outside [0, 1] or a rate outside those of the presets `permissive` and
    `strict`, and `EngineError` if the engine failed some rows.
    """
    if not 0 <= reasoned <= 1:
        raise InputError(f"the share of rows to reason about is {reasoned}: give a number from 0 to 1")
    low, high = PRESETS["permissive"], PRESETS["strict"]
    if not all(low <= rate <= high for rate in false_alarms):
        raise InputError(
            f"the rates of false alarms are {', '.join(map(str, false_alarms))}: give rates from {low} (permissive) to "
            f"{high} (strict)"
        )
    predictions: dict[Mode, list[Prediction]] = {}
    with locked_folder(out.with_name(f"{out.name}.rows"), "calibrate") as folder:
        sweep(out.parent, f"{out.name}.*")
        for mode in ("fast", "slow"):
            plain = Guard(guard.engine, replace(guard.policy, mode=mode, calibration=None, thresholds=(None, None)))
            predictions[mode] = judge_rows(plain, benchmarks, folder / mode, progress=progress)
        if failed := sum(is_engine_fault(row.error) for rows in predictions.values() for row in rows):
            raise EngineError(f"{failed:,} judgements are missing: {ENGINE_FAILED}")
        names = ", ".join(loaded.benchmark.name for loaded in benchmarks)
        calibration = fit(predictions["fast"], predictions["slow"], guard.model, names, reasoned, false_alarms)
        write_json(out, calibration.model_dump(mode="json"))
    return calibration
