"""Reasoning for a corpus (docs/method.md, section 2): ask a teacher about every row that has none.

DIR/reasoning.jsonl gets one line for each finished attempt; a stopped stage resumes from it. A row ends as kept or as
skipped; a row whose teacher could not be reached remains for the next run.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal

from guardreasoner_vl.corpus.attempts import REASONING, AttemptIndex, AttemptLog
from guardreasoner_vl.corpus.progress import count_progress, pending
from guardreasoner_vl.corpus.store import ROWS, read_info
from guardreasoner_vl.corpus.synthesis_policy import SynthesisPolicy
from guardreasoner_vl.errors import GuardError, InputError
from guardreasoner_vl.storage.lock import locked_folder
from guardreasoner_vl.teachers.base import Tokens
from guardreasoner_vl.teachers.budget import BudgetTracker, price_for

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from guardreasoner_vl.corpus.attempts import Asked, Attempt
    from guardreasoner_vl.sources.skipped import SkippedRows
    from guardreasoner_vl.teachers.base import Teacher, TeacherAnswer
    from guardreasoner_vl.teachers.budget import Budget, Price
    from guardreasoner_vl.types import Sample

StoppedBy = Literal["budget", "faults"]

FAULTS_IN_A_ROW = 2
"""The job stops after this many consecutive faults per concurrent request: the teacher is unreachable."""

_CHUNK = 64
_SYNC_SECONDS = 1.0


@dataclass(frozen=True)
class SynthesisStatus:
    """Counts of a running job; `tokens` and `cost` (USD, None without a price) include those of earlier runs."""

    done: int
    total: int
    kept: int
    skipped: int
    tokens: int
    cost: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class SynthesisReport:
    """The state of a corpus after a run: `rows` = `kept` + `skipped` + `remaining`, earlier runs included.

    `of_others` counts kept rows whose reasoning another teacher wrote, `faults` remaining rows whose teacher gave no
    answer. `attempts`, `tokens` and `cost` (USD, None without a price) are of all runs; `asked` is the number of this
    run's attempts.
    """

    rows: int
    kept: int
    of_others: int
    skipped: SkippedRows
    remaining: int
    faults: SkippedRows
    attempts: int
    asked: int
    tokens: int
    cost: float | None
    stopped_by: StoppedBy | None


def run(
    corpus_dir: Path,
    teacher: Teacher,
    *,
    attempts: int = 3,
    votes: int = 3,
    concurrency: int = 64,
    budget: Budget | None = None,
    price: Price | None = None,
    progress: Callable[[SynthesisStatus], None] | None = None,
) -> SynthesisReport:
    """Ask for the missing reasoning, `concurrency` rows at once; must not be called inside a running event loop.

    Raises `InputError` for invalid settings, `DataError` if `corpus_dir` is no corpus or another process works on it,
    and `HttpError` if the teacher refuses the key; answers received before are on the disk.
    """
    policy = SynthesisPolicy(teacher.name, attempts, votes, price_for(teacher.name, price, budget))
    if concurrency < 1:
        raise InputError(f"concurrency is {concurrency}: give 1 or more")
    read_info(corpus_dir)
    with locked_folder(corpus_dir, "synthesize"), AttemptLog(corpus_dir / REASONING) as log:
        job = _Job(corpus_dir / ROWS, teacher, policy, concurrency, budget, log, progress)
        asyncio.run(job.work())
        return job.result()


class _Job:
    def __init__(
        self,
        rows: Path,
        teacher: Teacher,
        policy: SynthesisPolicy,
        concurrency: int,
        budget: Budget | None,
        log: AttemptLog,
        progress: Callable[[SynthesisStatus], None] | None,
    ) -> None:
        self._rows, self._teacher, self._policy, self._concurrency = rows, teacher, policy, concurrency
        self._log, self._progress = log, progress
        self._index = AttemptIndex.read(log.path)
        self._attempts_before = self._index.attempts
        self._before = count_progress(rows, self._index, teacher.name)
        self._budget = BudgetTracker(budget, policy.price, self._index.tokens, self._cost() or 0.0)
        self._queue: asyncio.Queue[Sample | None] = asyncio.Queue(2 * concurrency)
        self._faults_in_a_row = 0
        self._stopped_by: StoppedBy | None = None
        self._kept = self._skipped = 0
        self._started = time.monotonic()

    async def work(self) -> None:
        """Ask until no row remains or the job must stop; raises the error that ends it early."""
        tasks = [asyncio.create_task(self._worker()) for _ in range(self._concurrency)]
        tasks.append(asyncio.create_task(self._feed()))
        syncing = asyncio.create_task(self._sync())
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (*tasks, syncing):
                task.cancel()
            await asyncio.gather(*tasks, syncing, return_exceptions=True)
            await self._teacher.aclose()

    def result(self) -> SynthesisReport:
        """The report of the corpus as it is now."""
        now = count_progress(self._rows, self._index, self._teacher.name)
        return SynthesisReport(
            rows=now.rows,
            kept=now.kept,
            of_others=now.of_others,
            skipped=now.skipped,
            remaining=now.remaining,
            faults=now.faults,
            attempts=self._index.attempts,
            asked=self._index.attempts - self._attempts_before,
            tokens=self._index.tokens.total,
            cost=self._cost(),
            stopped_by=self._stopped_by,
        )

    async def _feed(self) -> None:
        """Queue the rows in small chunks, read in a thread: memory stays bounded and the event loop is not blocked."""
        rows = pending(self._rows, self._index)
        while not self._stopped_by and (chunk := await asyncio.to_thread(_next, rows)):
            for sample in chunk:
                await self._queue.put(sample)
        for _ in range(self._concurrency):
            await self._queue.put(None)

    async def _worker(self) -> None:
        while sample := await self._queue.get():
            if self._stopped_by:
                continue
            await self._row(sample)
            if self._progress:
                self._progress(self._now())

    async def _row(self, sample: Sample) -> None:
        """Ask about one row until it is kept or skipped, or a request fails."""
        state, policy = self._index.state(sample.id), self._policy
        while not state.done:
            terminal_attempt = policy.terminal_attempt(sample, state)
            if terminal_attempt:
                self._record(terminal_attempt)
            elif policy.needs_votes(sample, state):
                answered = await self._ask(sample, "label", partial(self._teacher.label, sample))
                if answered is None:
                    return
                self._record(policy.vote(sample, answered))
            else:
                row = policy.with_majority_labels(sample, state) or sample
                ask = partial(self._teacher.write, row, state.complaint)
                answered = await self._ask(sample, "reasoning", ask)
                if answered is None:
                    return
                self._record(policy.reasoning(sample, state, answered))

    async def _ask(
        self, sample: Sample, kind: Asked, question: Callable[[], Awaitable[TeacherAnswer]]
    ) -> TeacherAnswer | None:
        """One answer; None if the job stops or the request failed, which is recorded."""
        most = self._teacher.estimate(sample)
        if self._stopped_by or not await self._budget.reserve(most):
            self._stopped_by = self._stopped_by or "budget"
            return None
        used = Tokens()
        try:
            answered = await question()
            used = answered.tokens
        except GuardError as error:
            self._record(self._policy.fault(sample, kind, error))
            self._count_fault(error)
            return None
        finally:
            self._budget.settle(most, used)
        self._faults_in_a_row = 0
        return answered

    def _count_fault(self, error: GuardError) -> None:
        """Count towards `FAULTS_IN_A_ROW`; raises the error if it would recur for every row."""
        if error.code == "auth":
            raise error
        if not isinstance(error, InputError):
            self._faults_in_a_row += 1
            if self._faults_in_a_row >= FAULTS_IN_A_ROW * max(self._concurrency, _CHUNK):
                self._stopped_by = self._stopped_by or "faults"

    def _record(self, attempt: Attempt) -> None:
        self._log.add(attempt)
        self._index.add(attempt)
        state = self._index.state(attempt.id)
        self._kept += state.kept
        self._skipped += state.skipped is not None

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            await asyncio.to_thread(self._log.sync)

    def _cost(self) -> float | None:
        price = self._policy.price
        return None if price is None else self._index.cost + price.of(self._index.unpriced)

    def _now(self) -> SynthesisStatus:
        before, finished = self._before, self._kept + self._skipped
        kept, skipped = before.kept + self._kept, before.skipped.total + self._skipped
        seconds = time.monotonic() - self._started
        return SynthesisStatus(
            done=kept + skipped,
            total=before.rows,
            kept=kept,
            skipped=skipped,
            tokens=self._index.tokens.total,
            cost=self._cost(),
            seconds_left=seconds / finished * (before.remaining - finished) if finished else None,
        )


def _next(rows: Iterator[Sample]) -> list[Sample]:
    return list(islice(rows, _CHUNK))
