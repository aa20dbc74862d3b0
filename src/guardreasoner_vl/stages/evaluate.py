"""Evaluation: judge benchmarks with the production guard, store one prediction for each row, compute the figures.

`OUT/predictions.jsonl` is on disk chunk by chunk, so a stopped run resumes. An error is a prediction too: it counts as
one wrong answer and lowers coverage. The next run judges the rows again for which the engine failed; many of them in
succession stop the run.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING

from guardreasoner_vl.choices import CHUNK
from guardreasoner_vl.engines.faults import FaultStreak, is_engine_fault
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.predictions import FORMAT, PREDICTIONS, RESULTS, SETTINGS, Prediction, row_digest
from guardreasoner_vl.evaluation.results import CONSTANT, Results, Settings, check_excluded, summarise
from guardreasoner_vl.storage.atomic import write_json
from guardreasoner_vl.storage.jsonl_log import JsonlLog
from guardreasoner_vl.storage.lock import locked_folder
from guardreasoner_vl.storage.resume import check_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark
    from guardreasoner_vl.evaluation.results import Baseline
    from guardreasoner_vl.guard import Moderator
    from guardreasoner_vl.types import Exchange, Sample

_Key = tuple[str, str]
"""Benchmark and id of a row."""

ENGINE_FAILED = "the engine failed; run the same command to judge them again"


def run(
    guard: Moderator[Exchange],
    benchmarks: Sequence[LoadedBenchmark],
    out: Path,
    *,
    content: bool = False,
    chunk: int = CHUNK,
    baselines: Mapping[str, Baseline] | None = None,
    excluded: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """`judge_rows`, and the figures of all rows but those of the `excluded` benchmarks, in `OUT/results.json` too.

    Raises `InputError` if one of `excluded` is not among the benchmarks.
    """
    check_excluded(excluded, [one.benchmark.name for one in benchmarks])
    with locked_folder(out, "evaluate"):
        rows = judge_rows(guard, benchmarks, out, content=content, chunk=chunk, progress=progress)
        results = summarise(rows, _settings(guard), {**CONSTANT, **(baselines or {})}, excluded)
        results.skipped = {
            loaded.benchmark.name: loaded.skipped.reasons for loaded in benchmarks if loaded.skipped.total
        }
        results.warnings = [warning for loaded in benchmarks if (warning := loaded.size_differs)]
        results.unanswered = sum(is_engine_fault(row.error) for row in rows)
        if results.unanswered:
            results.warnings.append(f"{results.unanswered:,} rows have no judgement: {ENGINE_FAILED}")
        write_json(out / RESULTS, results.as_json())
    return results


def judge_rows(
    guard: Moderator[Exchange],
    benchmarks: Sequence[LoadedBenchmark],
    out: Path,
    *,
    content: bool = False,
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Judge every row that has no prediction in `out`; returns all predictions in the rows' order.

    `content` stores texts, image paths and reasoning with the predictions. Raises `DataError` if another process
    works in `out`, or it holds predictions of another guard, mode, policy or set of rows, and `EngineError` if the
    engine fails many rows in a row.
    """
    streak = FaultStreak("mend the engine; the same command resumes")
    with (
        locked_folder(out, "evaluate"),
        JsonlLog(out / PREDICTIONS, FORMAT, "evaluate") as log,
    ):
        check_inputs(out / SETTINGS, "an evaluation", asdict(_settings(guard)))
        places = {(loaded.benchmark.name, sample.id): sample for loaded in benchmarks for sample in loaded.samples}
        rows = _stored(log, places)
        todo = [(key, sample) for key, sample in places.items() if key not in rows]
        verdicts = zip(todo, guard.moderate_batch((row.exchange() for _, row in todo), chunk=chunk), strict=True)
        while batch := list(islice(verdicts, chunk)):
            judged = {key: Prediction.of(sample, key[0], verdict, content) for (key, sample), verdict in batch}
            log.append(map(_prediction_line, judged.values()))
            rows |= judged
            for _, verdict in batch:
                streak.add(verdict.error)
            streak.check()
            if progress:
                progress(len(rows), len(places))
        ordered = [rows[key] for key in places]
        if list(rows) != list(places):  # failed rows were judged again, out of order
            log.replace(map(_prediction_line, ordered))
    return ordered


def _settings(guard: Moderator[Exchange]) -> Settings:
    return Settings(guard.model.name, guard.model.revision, guard.mode, guard.settings)


def _prediction_line(row: Prediction) -> bytes:
    return row.model_dump_json().encode() + b"\n"


def _stored(log: JsonlLog[Prediction], wanted: Mapping[_Key, Sample]) -> dict[_Key, Prediction]:
    """The log's predictions by row; those that the engine failed are removed from the log, to be judged again."""
    rows: dict[_Key, Prediction] = {}
    failed: set[int] = set()
    unknown = changed = 0
    for number, row in log.rows():
        key = (row.benchmark, row.id)
        unknown += key not in wanted
        changed += key in wanted and row.digest not in (None, row_digest(wanted[key]))
        if is_engine_fault(row.error):
            failed.add(number)
        else:
            rows[key] = row
    if unknown or changed:
        fault = "are not in the benchmarks" if unknown else "have changed since"
        raise DataError(
            f"{log.path} holds predictions of {unknown or changed:,} rows that {fault}; give the same benchmarks or "
            "a new --out"
        )
    if failed:
        log.without(failed)
    return rows
