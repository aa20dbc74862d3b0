"""Reasoning for a corpus (method, section 2): a teacher is asked about every row that has none.

DIR/reasoning.jsonl gets one line for each attempt, as soon as it is over; the stage, run again, goes on from there.
A row ends as kept or as set aside; one whose teacher could not be reached is left for the next run.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal

from guardreasoner_vl.corpus.attempts import REASONING, AttemptLog, Ledger
from guardreasoner_vl.corpus.progress import pending, standing
from guardreasoner_vl.corpus.store import ROWS, read_info
from guardreasoner_vl.corpus.synthesis_policy import Terms
from guardreasoner_vl.errors import GuardError, InputError
from guardreasoner_vl.storage.lock import locked_folder
from guardreasoner_vl.teachers.base import Tokens
from guardreasoner_vl.teachers.budget import Purse, price_for

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from guardreasoner_vl.corpus.attempts import Asked, Attempt
    from guardreasoner_vl.sources.skipped import SetAside
    from guardreasoner_vl.teachers.base import Answered, Teacher
    from guardreasoner_vl.teachers.budget import Budget, Price
    from guardreasoner_vl.types import Sample

StoppedBy = Literal["budget", "faults"]

FAULTS_IN_A_ROW = 2
"""This many faults for each place in flight, and no answer between them: the teacher is gone, the job stops."""

_CHUNK = 64
_SYNC_SECONDS = 1.0


@dataclass(frozen=True)
class Progress:
    """Where the job stands; `tokens` and `cost` (USD, None without a price) include those of earlier runs."""

    done: int
    total: int
    kept: int
    set_aside: int
    tokens: int
    cost: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class Synthesis:
    """What became of a corpus: `rows` = `kept` + `set_aside` + `left`, earlier runs included.

    `faults` counts rows left whose teacher gave no answer. `attempts`, `tokens` and `cost` (USD, None without a
    price) are of all runs; `asked` is the number of this run's attempts.
    """

    rows: int
    kept: int
    set_aside: SetAside
    left: int
    faults: SetAside
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
    progress: Callable[[Progress], None] | None = None,
) -> Synthesis:
    """Ask for what is missing, `concurrency` rows at once; must not be called where an event loop runs.

    Raises `InputError` for settings that cannot be, `DataError` if `corpus_dir` is no corpus or another process
    works on it, and `HttpError` if the teacher refuses the key; whatever was answered is on the disk then.
    """
    terms = Terms(teacher.name, attempts, votes, price_for(teacher.name, price, budget))
    if concurrency < 1:
        raise InputError("concurrency must be 1 or more")
    read_info(corpus_dir)
    with locked_folder(corpus_dir, "synthesize"), AttemptLog(corpus_dir / REASONING) as log:
        job = _Job(corpus_dir / ROWS, teacher, terms, concurrency, budget, log, progress)
        asyncio.run(job.work())
        return job.result()


class _Job:
    def __init__(
        self,
        rows: Path,
        teacher: Teacher,
        terms: Terms,
        concurrency: int,
        budget: Budget | None,
        log: AttemptLog,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._rows, self._teacher, self._terms, self._concurrency = rows, teacher, terms, concurrency
        self._log, self._progress = log, progress
        self._ledger = Ledger.read(log.path)
        self._attempts_before = self._ledger.attempts
        self._before = standing(rows, self._ledger)
        self._purse = Purse(budget, terms.price, self._ledger.tokens, self._cost() or 0.0)
        self._queue: asyncio.Queue[Sample | None] = asyncio.Queue(2 * concurrency)
        self._faults_in_a_row = 0
        self._stopped_by: StoppedBy | None = None
        self._kept = self._set_aside = 0
        self._started = time.monotonic()

    async def work(self) -> None:
        """Ask until nothing is left or the job has to stop; raises what ends it early."""
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

    def result(self) -> Synthesis:
        """Where the corpus stands now."""
        now = standing(self._rows, self._ledger)
        return Synthesis(
            rows=now.rows,
            kept=now.kept,
            set_aside=now.set_aside,
            left=now.left,
            faults=now.faults,
            attempts=self._ledger.attempts,
            asked=self._ledger.attempts - self._attempts_before,
            tokens=self._ledger.tokens.total,
            cost=self._cost(),
            stopped_by=self._stopped_by,
        )

    async def _feed(self) -> None:
        """Hand out rows a few at a time: none are read long before their turn, and no image blocks the loop."""
        rows = pending(self._rows, self._ledger)
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
        """Ask about one row until it is done, or no answer comes."""
        state, terms = self._ledger.state(sample.id), self._terms
        while not state.done:
            hopeless = terms.hopeless(sample, state)
            if hopeless:
                self._record(hopeless)
            elif terms.lacks_votes(sample, state):
                answered = await self._ask(sample, "label", partial(self._teacher.label, sample))
                if answered is None:
                    return
                self._record(terms.vote(sample, answered))
            else:
                row = terms.labelled(sample, state) or sample
                ask = partial(self._teacher.write, row, state.complaint)
                answered = await self._ask(sample, "reasoning", ask)
                if answered is None:
                    return
                self._record(terms.reasoning(sample, state, answered))

    async def _ask(self, sample: Sample, asked: Asked, question: Callable[[], Awaitable[Answered]]) -> Answered | None:
        """One answer; None if the job stops or none came, which is recorded."""
        most = self._teacher.estimate(sample)
        if self._stopped_by or not await self._purse.reserve(most):
            self._stopped_by = self._stopped_by or "budget"
            return None
        took = Tokens()
        try:
            answered = await question()
            took = answered.tokens
        except GuardError as error:
            self._record(self._terms.fault(sample, asked, error))
            self._count_fault(error)
            return None
        finally:
            self._purse.settle(most, took)
        self._faults_in_a_row = 0
        return answered

    def _count_fault(self, error: GuardError) -> None:
        """Raises the error if no other row can fare better."""
        if error.code == "auth":
            raise error
        if not isinstance(error, InputError):
            self._faults_in_a_row += 1
            if self._faults_in_a_row >= FAULTS_IN_A_ROW * max(self._concurrency, _CHUNK):
                self._stopped_by = self._stopped_by or "faults"

    def _record(self, attempt: Attempt) -> None:
        self._log.add(attempt)
        self._ledger.add(attempt)
        state = self._ledger.state(attempt.id)
        self._kept += state.kept
        self._set_aside += state.set_aside is not None

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            await asyncio.to_thread(self._log.sync)

    def _cost(self) -> float | None:
        price = self._terms.price
        return None if price is None else self._ledger.cost + price.of(self._ledger.unpriced)

    def _now(self) -> Progress:
        before, finished = self._before, self._kept + self._set_aside
        kept, set_aside = before.kept + self._kept, before.set_aside.total + self._set_aside
        seconds = time.monotonic() - self._started
        return Progress(
            done=kept + set_aside,
            total=before.rows,
            kept=kept,
            set_aside=set_aside,
            tokens=self._ledger.tokens.total,
            cost=self._cost(),
            seconds_left=seconds / finished * (before.left - finished) if finished else None,
        )


def _next(rows: Iterator[Sample]) -> list[Sample]:
    return list(islice(rows, _CHUNK))
