"""Evaluation: benchmarks through the same guard as production, one prediction for each row, then the figures.

`OUT/predictions.jsonl` grows chunk by chunk and is on disk before the next one; a run that stopped goes on
where it was. Errors are predictions too: they count as wrong once, and coverage tells how many there are.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from guardreasoner_vl.batch_output import sync
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.evaluation.predictions import PREDICTIONS, RESULTS, SETTINGS, Prediction, read_predictions
from guardreasoner_vl.evaluation.results import CONSTANT, Results, Settings, check_apart, summarise
from guardreasoner_vl.guard import CHUNK
from guardreasoner_vl.run_dir import changed_keys, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from guardreasoner_vl.evaluation.benchmarks.base import Loaded
    from guardreasoner_vl.evaluation.results import Baseline
    from guardreasoner_vl.types import Exchange, Mode, ModelInfo, Verdict


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
    rows = judge(guard, benchmarks, out, content=content, chunk=chunk, progress=progress)
    results = summarise(rows, _settings(guard), {**CONSTANT, **(baselines or {})}, apart)
    results.set_aside = {one.benchmark.name: one.set_aside.reasons for one in benchmarks if one.set_aside.total}
    results.warnings = [told for one in benchmarks if (told := one.size_differs)]
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
    """Judge every row that `out` holds no prediction of; all predictions, the earlier ones first.

    `content` stores texts, picture paths and reasoning with the predictions. Raises `DataError` if `out` holds
    predictions of another guard, mode, policy or set of rows.
    """
    out.mkdir(parents=True, exist_ok=True)
    _check_same(out / SETTINGS, _settings(guard))
    path = out / PREDICTIONS
    rows = _stored(path, benchmarks)
    done = {(row.benchmark, row.id) for row in rows}
    total = sum(len(loaded.samples) for loaded in benchmarks)
    todo = (
        (loaded.benchmark.name, sample)
        for loaded in benchmarks
        for sample in loaded.samples
        if (loaded.benchmark.name, sample.id) not in done
    )
    with path.open("ab") as stream:
        while batch := list(islice(todo, chunk)):
            verdicts = guard.moderate_batch((sample.exchange() for _, sample in batch), chunk=chunk)
            judged = [
                Prediction.of(sample, name, verdict, content)
                for (name, sample), verdict in zip(batch, verdicts, strict=True)
            ]
            stream.writelines(row.model_dump_json().encode() + b"\n" for row in judged)
            sync(stream)
            rows += judged
            if progress:
                progress(len(rows), total)
    return rows


def _settings(guard: Judging) -> Settings:
    return Settings(guard.model.name, guard.model.revision, guard.mode, guard.settings)


def _check_same(path: Path, settings: Settings) -> None:
    resolved = json.loads(json.dumps(asdict(settings)))  # as it will be read back: lists for tuples
    if path.is_file():
        changed = changed_keys(json.loads(path.read_text("utf-8")), resolved)
        if changed:
            raise DataError(f"{path.parent} holds an evaluation with another {', '.join(changed)}; give a new --out")
    write_json(path, resolved)


def _stored(path: Path, benchmarks: Sequence[Loaded]) -> list[Prediction]:
    """The predictions made already; a line torn by a kill is cut off."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    known = {(loaded.benchmark.name, sample.id) for loaded in benchmarks for sample in loaded.samples}
    rows = list(read_predictions(path))
    if strange := sum((row.benchmark, row.id) not in known for row in rows):
        raise DataError(
            f"{path} holds predictions of {strange:,} rows that are not asked for; give the same benchmarks or "
            "a new --out"
        )
    return rows
