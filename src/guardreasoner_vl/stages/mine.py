"""Hard-sample mining (paper, section 3.3; docs/method.md, section 4): select the rows that the guard gets wrong.

    rows of the split train -> k answers each -> right or wrong (`mining.candidates`) -> the kept rows as a corpus

OUT/candidates.jsonl       one line for each judged row, on the disk before the next chunk is generated
OUT/mining_settings.json   the settings that the candidates depend on; a run with other settings is refused
OUT/mining.json, pass_rates.svg
OUT/rows.parquet, corpus.json, skipped.jsonl

A stopped run resumes. A row without all of its answers has failed; the next run generates them again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.corpus.progress import REPEATED, TRAIN
from guardreasoner_vl.corpus.store import CorpusInfo, is_corpus, read_corpus, read_info, write_corpus
from guardreasoner_vl.engines.faults import FaultStreak, is_engine_fault
from guardreasoner_vl.errors import DataError, InputError
from guardreasoner_vl.mining.candidates import FORMAT, Candidates, PassRates, is_kept, read_candidates
from guardreasoner_vl.mining.report import REPORT, MiningReport, unanswered, why_nothing, write_mining_report
from guardreasoner_vl.mining.sampling import CandidateSampling, SampledRow
from guardreasoner_vl.sources.content import content_digest
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.storage.jsonl_log import JsonlLog
from guardreasoner_vl.storage.lock import locked_folder
from guardreasoner_vl.storage.resume import check_inputs, read_inputs, refuse_changed
from guardreasoner_vl.types import VerdictError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from guardreasoner_vl.guard import RowSharer
    from guardreasoner_vl.mining.sampling import Unanswered
    from guardreasoner_vl.recipe import MineSection, Recipe
    from guardreasoner_vl.types import Sample

CANDIDATES, SETTINGS = "candidates.jsonl", "mining_settings.json"
CHUNK = 64


def run(
    recipe: Recipe,
    corpus: Path,
    guard: RowSharer,
    out: Path,
    *,
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> MiningReport:
    """Generate candidates for every drawn row that has none in `out`, `chunk` rows at once; write the kept rows.

    As long as no row was kept, `mine.keep` may change in the same `out`. Raises `DataError` if `corpus` has no labelled
    training row, `out` holds another run or another process works there, or no row is kept, and `EngineError` if the
    engine fails many rows in a row.
    """
    if chunk < 1:
        raise InputError(f"chunk is {chunk} rows: give at least 1")
    with locked_folder(out, "mine"):
        return _mined(recipe, corpus, guard, out, chunk, progress)


def is_finished(out: Path, recipe: Recipe) -> bool:
    """Whether all rows were judged and the kept ones written. Raises `DataError` if the settings have changed."""
    if not is_corpus(out):
        return False
    settings = read_inputs(out / SETTINGS)
    refuse_changed(out, "mined rows", settings, {**settings, "mine": _decisive(recipe.mine), "seed": recipe.seed})
    return not unanswered(read_inputs(out / REPORT).get("failed", {}))


def _mined(
    recipe: Recipe,
    corpus: Path,
    guard: RowSharer,
    out: Path,
    chunk: int,
    progress: Callable[[int, int], None] | None,
) -> MiningReport:
    info, section, log = read_info(corpus), recipe.mine, out / CANDIDATES
    survey = _survey(corpus, section.limit, recipe.seed)
    if not survey.drawn:
        raise DataError(f"{corpus}: no labelled row of the split train; give a corpus that has some")
    settings = {
        "mine": _decisive(section),
        "seed": recipe.seed,
        "model": {"name": guard.model.name, "revision": guard.model.revision},
        "corpus": {"name": info.name, "digest": survey.digest},
    }
    _check_same_settings(out, settings)
    work = CandidateSampling(section, recipe.seed)
    failures = _ask(guard, work, corpus, log, survey, chunk, progress)
    report, kept = _summary(log, section, survey, failures.rows)
    write_mining_report(out, report)
    if kept:
        mined = CorpusInfo(name=recipe.name, seed=recipe.seed, sources=info.sources)
        write_corpus(out, mined, _rows_of(corpus, kept))
    else:
        raise DataError(f"{out}: {why_nothing(report, section, failures.last)}")
    return report


def _ask(
    guard: RowSharer,
    work: CandidateSampling,
    corpus: Path,
    path: Path,
    survey: _Survey,
    chunk: int,
    progress: Callable[[int, int], None] | None,
) -> _Failures:
    """Judge every row that is not in the log; returns those that failed."""
    failures = _Failures()
    with JsonlLog(path, FORMAT, "mine") as log:
        todo = survey.drawn - _finished(log, survey.drawn)
        done, rows = len(survey.drawn) - len(todo), map(SampledRow.of, _rows_of(corpus, todo))
        results = guard.share(work, rows, chunk=chunk)
        while batch := list(islice(results, chunk)):
            log.append(row.model_dump_json().encode() + b"\n" for row in batch if isinstance(row, Candidates))
            for row in batch:
                failures.add(row)
            failures.streak.check()
            done += len(batch)
            if progress:
                progress(done, len(survey.drawn))
    return failures


@dataclass
class _Survey:
    """The training rows of a corpus: their number, the ids drawn, the unusable ones, and a digest of their content."""

    drawn: set[str]
    rows: int
    skipped: SkippedRows
    digest: str


def _survey(corpus: Path, limit: int | None, seed: int) -> _Survey:
    skipped, ids, usable = SkippedRows(), set[str](), list[str]()
    rows = 0
    digest = content_digest(sample for sample in read_corpus(corpus) if sample.split == TRAIN)
    for sample in read_corpus(corpus):
        if sample.split != TRAIN:
            continue
        rows += 1
        if reason := REPEATED if sample.id in ids else _unusable(sample):
            skipped.add(reason, sample.id)
        else:
            usable.append(sample.id)
        ids.add(sample.id)
    if limit is not None and limit < len(usable):
        usable = random.Random(f"{seed}-mine").sample(usable, limit)
    return _Survey(set(usable), rows, skipped, digest)


def _unusable(sample: Sample) -> str | None:
    """Why an answer to the row cannot be graded, None if it can; a label of an absent text does not count."""
    try:
        sample.exchange()
    except InputError:
        return "nothing to judge"
    known = (sample.has_request and sample.request_label) or (sample.has_response and sample.response_label)
    return None if known else "no label"


def _decisive(section: MineSection) -> dict[str, Any]:
    """The settings that candidates depend on."""
    return section.model_dump(mode="json", exclude={"base_url"})


def _check_same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raises `DataError` for changed settings; `mine.keep`, which no candidate depends on, may change until a corpus
    is written.
    """
    if is_corpus(out) and not (out / SETTINGS).is_file():
        raise DataError(f"{out} holds a corpus that `mine` did not make; give a new --out")
    check_inputs(out / SETTINGS, "mined rows", settings, free=() if is_corpus(out) else ("mine.keep",))


def _finished(log: JsonlLog[Candidates], drawn: set[str]) -> set[str]:
    """The ids of the rows judged already. Raises `DataError` if one of them is not drawn."""
    finished = {row.id for _, row in log.rows()}
    if unknown := len(finished - drawn):
        raise DataError(f"{log.path} holds candidates of {unknown:,} rows that are not drawn; give a new --out")
    return finished


def _rows_of(corpus: Path, ids: set[str]) -> Iterator[Sample]:
    """Stream the training rows with these ids; of rows with the same id, the first."""
    wanted = set(ids)
    for sample in read_corpus(corpus):
        if sample.split == TRAIN and sample.id in wanted:
            wanted.remove(sample.id)
            yield sample


@dataclass
class _Failures:
    """The rows without all of their answers; `last` is the engine's last error, or else the first row's."""

    rows: SkippedRows = field(default_factory=SkippedRows)
    row_fault: str = ""
    streak: FaultStreak = field(default_factory=lambda: FaultStreak("mend the engine; the same command resumes"))

    @property
    def last(self) -> str:
        return self.streak.last or self.row_fault

    def add(self, result: Candidates | Unanswered) -> None:
        """Count a row, whether it was answered or not."""
        if isinstance(result, Candidates):
            self.streak.add(None)
            return
        self.rows.add(result.code, result.id)
        self.streak.add(VerdictError(code=result.code, message=result.message))
        if not is_engine_fault(result.code):
            self.row_fault = self.row_fault or result.message


def _summary(log: Path, section: MineSection, survey: _Survey, failed: SkippedRows) -> tuple[MiningReport, set[str]]:
    """The report over all judged rows, and the ids of the kept ones."""
    kept: set[str] = set()
    rates, count = PassRates(), section.candidates
    for row in read_candidates(log):
        rates.add(row)
        if is_kept(row.right, section.keep):
            kept.add(row.id)
    report = MiningReport(
        rows=survey.rows,
        drawn=len(survey.drawn),
        judged=sum(rates.of_all(count)),
        kept=len(kept),
        failed=failed,
        skipped=survey.skipped,
        coverage=rates.coverage,
        tokens_mean=rates.tokens_mean,
        right=rates.of_all(count),
        sources={name: rates.of(name, count) for name in sorted(rates.sources)},
    )
    return report, kept
