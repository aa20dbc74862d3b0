"""Evaluation: benchmarks through the same guard as production, one prediction for each row, then the figures.

`OUT/predictions.jsonl` grows chunk by chunk and is on disk before the next one; a run that stopped goes on
where it was. Errors are predictions too: they count as wrong once, and coverage tells how many there are. A row that
the engine failed is asked again by the next run; many of them one after another stop the run.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from guardreasoner_vl.engines.faults import FaultStreak, is_engine_fault
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.predictions import FORMAT, PREDICTIONS, RESULTS, SETTINGS, Prediction, digest_of
from guardreasoner_vl.evaluation.results import CONSTANT, Results, Settings, check_apart, summarise
from guardreasoner_vl.guard import CHUNK
from guardreasoner_vl.recipe.run_dir import changed_keys
from guardreasoner_vl.storage.atomic import write_json
from guardreasoner_vl.storage.jsonl_log import JsonlLog
from guardreasoner_vl.storage.lock import locked_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from guardreasoner_vl.evaluation.benchmarks.base import Loaded
    from guardreasoner_vl.evaluation.results import Baseline
    from guardreasoner_vl.types import Exchange, Mode, ModelInfo, Sample, Verdict

_Key = tuple[str, str]
"""Benchmark and id of a row."""

ENGINE_FAILED = "the engine failed; the same command asks about them again"


class Judging(Protocol):
    """What is evaluated: `Guard`, or another guard behind an adapter."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def mode(self) -> Mode: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def moderate_batch(self, items: Iterable[Exchange], *, chunk: int) -> Iterator[Verdict]: ...


def run(
    guard: Judging,
    benchmarks: Sequence[Loaded],
    out: Path,
    *,
    content: bool = False,
    chunk: int = CHUNK,
    baselines: Mapping[str, Baseline] | None = None,
    apart: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """`judge`, and the figures of all rows but those of the benchmarks set `apart`, in `OUT/results.json` too.

    Raises `InputError` if one of those is not among the benchmarks.
    """
    check_apart(apart, [one.benchmark.name for one in benchmarks])
    with locked_folder(out, "evaluate"):
        rows = judge(guard, benchmarks, out, content=content, chunk=chunk, progress=progress)
        results = summarise(rows, _settings(guard), {**CONSTANT, **(baselines or {})}, apart)
        results.set_aside = {
            loaded.benchmark.name: loaded.set_aside.reasons for loaded in benchmarks if loaded.set_aside.total
        }
        results.warnings = [warning for loaded in benchmarks if (warning := loaded.size_differs)]
        results.unanswered = sum(is_engine_fault(row.error) for row in rows)
        if results.unanswered:
            results.warnings.append(f"{results.unanswered:,} rows have no judgement: {ENGINE_FAILED}")
        write_json(out / RESULTS, results.as_json())
    return results


def judge(
    guard: Judging,
    benchmarks: Sequence[Loaded],
    out: Path,
    *,
    content: bool = False,
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Judge every row that `out` holds no prediction of; all predictions, in the rows' order.

    `content` stores texts, image paths and reasoning with the predictions. Raises `DataError` if another process
    works in `out`, or it holds predictions of another guard, mode, policy or set of rows, and `EngineError` if the
    engine is gone.
    """
    streak = FaultStreak("mend the engine; the same command goes on")
    with (
        locked_folder(out, "evaluate"),
        JsonlLog(out / PREDICTIONS, FORMAT, "evaluate") as log,
    ):
        _check_same(out / SETTINGS, _settings(guard))
        places = {(loaded.benchmark.name, sample.id): sample for loaded in benchmarks for sample in loaded.samples}
        rows = _stored(log, places)
        todo = ((key, sample) for key, sample in places.items() if key not in rows)
        while batch := list(islice(todo, chunk)):
            verdicts = list(guard.moderate_batch([sample.exchange() for _, sample in batch], chunk=chunk))
            judged = {
                key: Prediction.of(sample, key[0], verdict, content)
                for (key, sample), verdict in zip(batch, verdicts, strict=True)
            }
            log.append(map(_line, judged.values()))
            rows |= judged
            for verdict in verdicts:
                streak.add(verdict.error)
            streak.check()
            if progress:
                progress(len(rows), len(places))
        ordered = [rows[key] for key in places]
        if list(rows) != list(places):  # rows were asked again
            log.replace(map(_line, ordered))
    return ordered


def _settings(guard: Judging) -> Settings:
    return Settings(guard.model.name, guard.model.revision, guard.mode, guard.settings)


def _line(row: Prediction) -> bytes:
    return row.model_dump_json().encode() + b"\n"


def _check_same(path: Path, settings: Settings) -> None:
    resolved = json.loads(json.dumps(asdict(settings)))  # as it will be read back: lists for tuples
    if path.is_file():
        changed = changed_keys(json.loads(path.read_text("utf-8")), resolved)
        if changed:
            raise DataError(f"{path.parent} holds an evaluation with another {', '.join(changed)}; give a new --out")
    write_json(path, resolved)


def _stored(log: JsonlLog[Prediction], asked: Mapping[_Key, Sample]) -> dict[_Key, Prediction]:
    """The predictions in the log, by row; those of rows that the engine failed are removed, to be asked for again."""
    rows: dict[_Key, Prediction] = {}
    failed: set[int] = set()
    strange = changed = 0
    for number, row in log.rows():
        key = (row.benchmark, row.id)
        strange += key not in asked
        changed += key in asked and row.digest not in (None, digest_of(asked[key]))
        if is_engine_fault(row.error):
            failed.add(number)
        else:
            rows[key] = row
    if strange or changed:
        why = "are not asked for" if strange else "have changed since"
        raise DataError(
            f"{log.path} holds predictions of {strange or changed:,} rows that {why}; give the same benchmarks or "
            "a new --out"
        )
    if failed:
        log.without(failed)
    return rows
