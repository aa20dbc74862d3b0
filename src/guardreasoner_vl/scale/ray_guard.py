"""`RayGuard`: the guards of a Ray cluster, used as one. Each guard has its own process, and a GPU if there are any.

A worker gets one part of the rows at a time, and the next part once it has answered; parts are read as they are needed
(`scale.job`). A worker that dies, or whose machine does, is replaced on any machine with room, and its part is judged
again. The results return to this process once each, in the order of the rows, and only this process writes them; a run
that resumes judges the rows that are not on its disk.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from guardreasoner_vl.choices import CHUNK
from guardreasoner_vl.engines.faults import is_engine_fault
from guardreasoner_vl.errors import EngineError, GuardError, InputError, reason_of
from guardreasoner_vl.guard import as_exchange
from guardreasoner_vl.images.portable import portable_exchange
from guardreasoner_vl.judging.judge import error_verdict
from guardreasoner_vl.scale.cluster import cluster_size, connect
from guardreasoner_vl.scale.job import RowQueue
from guardreasoner_vl.types import same_model
from guardreasoner_vl.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from guardreasoner_vl.guard import Guard, Item, RowWork
    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.scale.job import RowRange
    from guardreasoner_vl.types import Mode, ModelInfo, Verdict

RowT = TypeVar("RowT")
ResultT = TypeVar("ResultT")

PATIENCE = 600.0
"""Seconds to wait, while no worker has a guard, for room on the cluster and for a model to load."""

PARTS_AHEAD = 3
"""Parts in memory for each worker: one that is judged, and judged ones that wait for an earlier part."""

BYTES_AHEAD = 2_000_000_000
"""Bytes of rows without a verdict in memory, with their images' files; Ray has a copy of those that workers judge."""

STARTS = 3
"""The job ends after this many consecutive workers that could not open a guard, if none has one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Opened:
    """A worker has opened its guard: its model, settings and version, which must be the same for all workers."""

    model: ModelInfo
    mode: Mode
    settings: dict[str, Any]
    version: str


@dataclass(frozen=True)
class _Refused:
    """A worker cannot open its guard, for this reason."""

    reason: str


class _Worker:
    """The class of the Ray actors: one guard in a process of the cluster."""

    def __init__(self) -> None:
        self._guard: Guard | None = None

    def open(self, open_guard: Callable[[], Guard], folder: str) -> _Opened | _Refused:
        """Open the guard; relative paths start at `folder`, if this machine has that folder."""
        with suppress(OSError):
            os.chdir(folder)
        try:
            guard = self._guard = open_guard()
        except Exception as error:
            return _Refused(f"{os.uname().nodename}: {reason_of(error, 500)}")
        return _Opened(guard.model, guard.mode, guard.settings, __version__)

    def run(self, work: RowWork[RowT, ResultT], rows: Sequence[RowT]) -> list[ResultT]:
        """The rows' results, in order."""
        if self._guard is None:
            raise EngineError("the worker has no guard: open it first")
        return work(self._guard, rows)


@dataclass
class _Member:
    """This process's record of one worker.

    `actor` is its Ray handle, `replaces` whether it replaces a lost worker, `opened` whether its guard is open, and
    `part` the part of the current job that it judges, None if it judges nothing.
    """

    actor: Any
    replaces: bool
    opened: bool = False
    part: RowRange[Any] | None = None


@dataclass(frozen=True)
class _Judging:
    """Judges items as `Guard.moderate_batch` does; instead of an invalid item, which may be too deep to be pickled, its
    error is sent."""

    policy: Policy
    model: ModelInfo

    def __call__(self, guard: Guard, rows: Sequence[Item | InputError]) -> list[Verdict]:
        items = [row for row in rows if not isinstance(row, InputError)]
        verdicts = guard.moderate_batch(items, chunk=len(rows))
        return [
            error_verdict(row, guard.policy, guard.model) if isinstance(row, InputError) else next(verdicts)
            for row in rows
        ]

    def portable(self, row: Item | InputError) -> Item | InputError:
        try:
            return row if isinstance(row, InputError) else portable_exchange(as_exchange(row))
        except InputError as error:
            return type(error)(str(error))  # without its traceback, which holds the row

    def unanswered(self, _: Item | InputError, error: GuardError) -> Verdict:
        return error_verdict(error, self.policy, self.model)

    def is_unanswered(self, result: Verdict) -> bool:
        return result.error is not None and is_engine_fault(result.error.code)


class RayGuard:
    """Opens `workers` guards on the cluster at `address`, each with `open_guard`, which is pickled and sent there.

    `policy` is that of the guards. With `on_gpus` each takes one GPU if the cluster has any; `workers` None means one
    for each GPU. `lost` counts the workers that were replaced. `patience` is in seconds. Raises what `connect` and
    `cluster_size` raise, and `EngineError` if the guards cannot be opened.
    """

    def __init__(
        self,
        address: str,
        open_guard: Callable[[], Guard],
        policy: Policy,
        workers: int | None = None,
        *,
        on_gpus: bool = True,
        patience: float = PATIENCE,
    ) -> None:
        self._ray = connect(address)
        self._open_guard, self._policy, self._patience = open_guard, policy, patience
        self._busy: dict[Any, _Member] = {}
        self._idle: list[_Member] = []
        self._failed_starts = 0
        self._opened: _Opened | None = None
        self.lost = 0
        try:
            count, gpus = cluster_size(self._ray, workers, on_gpus)
            self._actor = self._ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Worker)
            self._workers = count
            for _ in range(count):
                self._start()
            self._first = self._wait_for_first()
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> ModelInfo:
        """Name and revision of the model that judges."""
        return self._first.model

    @property
    def mode(self) -> Mode:
        """The guards' default mode."""
        return self._first.mode

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that affect verdicts, besides the model and the mode, as plain data."""
        return self._first.settings

    def moderate_batch(self, items: Iterable[Item], *, chunk: int = CHUNK) -> Iterator[Verdict]:
        """Judge many items lazily, in order, `chunk` at a time on each worker; invalid items get `error` verdicts."""
        return self.share(_Judging(self._policy, self.model), items, chunk=chunk)

    def share(self, work: RowWork[RowT, ResultT], rows: Iterable[RowT], *, chunk: int = CHUNK) -> Iterator[ResultT]:
        """The rows' results, lazily and in order; each worker does `work` on `chunk` rows at a time.

        Only one such iterator may run at a time. Raises `EngineError` if no worker can be replaced.
        """
        if chunk < 1:
            raise InputError("chunk is a number of rows: give at least 1")
        return self._shared(RowQueue(work, rows, chunk, PARTS_AHEAD * self._workers * chunk, BYTES_AHEAD))

    def close(self) -> None:
        """End the workers and leave the cluster; the cluster `local` ends too."""
        self._ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shared(self, job: RowQueue[RowT, ResultT]) -> Iterator[ResultT]:
        try:
            self._hand_out(job)
            while not job.done:
                self._advance(job)
                self._hand_out(job)
                yield from job.finished()
                self._hand_out(job)  # results that were taken make room for more rows
        finally:
            for member in self._busy.values():
                member.part = None

    def _hand_out(self, job: RowQueue[RowT, ResultT]) -> None:
        while self._idle and (part := job.next_part()):
            member = self._idle.pop()
            member.part = part
            self._busy[member.actor.run.remote(job.work, part.rows)] = member

    def _start(self, replaces: bool = False) -> None:
        member = _Member(self._actor.remote(), replaces)
        self._busy[member.actor.open.remote(self._open_guard, str(Path.cwd()))] = member

    def _wait_for_first(self) -> _Opened:
        while self._opened is None:
            self._advance(None)
        return self._opened

    def _advance(self, job: RowQueue[Any, Any] | None) -> None:
        """Wait until a worker has opened its guard, has judged its part, or is lost."""
        working = any(member.opened for member in self._busy.values())
        ready, _ = self._ray.wait(list(self._busy), timeout=None if working else self._patience)
        if not ready:
            raise EngineError(
                f"no worker was ready within {self._patience:g} s; check that the cluster has free "
                "GPUs and cores, and that the model can be loaded there; the same command resumes"
            )
        member = self._busy.pop(ready[0])
        if not member.opened:
            self._open(member, ready[0])
        elif self._answered(member, ready[0], job):
            self._idle.append(member)
        else:
            self._replace(member)

    def _answered(self, member: _Member, ref: Any, job: RowQueue[Any, Any] | None) -> bool:
        """Pass a part's results to the job; returns whether the worker can judge further parts."""
        part, member.part = member.part, None
        fault: Exception | None = None
        results: list[Any] = []
        try:
            results = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            fault = error
        if job and part and fault:
            job.lose(part)
        elif job and part and not job.add(part, results):
            return False
        return fault is None or isinstance(fault, self._ray.exceptions.RayTaskError)

    def _replace(self, member: _Member) -> None:
        _log.warning("a worker was lost; another one is started")
        self.lost += 1
        self._ray.kill(member.actor)
        self._start(replaces=True)

    def _open(self, member: _Member, ref: Any) -> None:
        """Add a worker that has opened its guard to the idle ones; start another one for a worker that failed."""
        try:
            reason = self._refusal(self._ray.get(ref))
        except self._ray.exceptions.RayError as error:
            reason, refused = _death(error), False
        else:
            refused = reason is not None
        if reason is None:
            member.opened, self._failed_starts = True, 0
            self._idle.append(member)
            return
        self._failed_starts += 1
        others = any(other.opened for other in (*self._busy.values(), *self._idle))
        if (refused and not member.replaces) or (self._failed_starts >= STARTS and not others):
            raise EngineError(f"a worker cannot open the guard: {reason}")
        _log.warning("a worker could not open its guard: %s", reason)
        if self._failed_starts < STARTS:
            self._start(member.replaces)

    def _refusal(self, answer: _Opened | _Refused) -> str | None:
        """Why a worker cannot take part; None if it can."""
        if isinstance(answer, _Refused):
            return answer.reason
        if answer.version != __version__:
            return f"the worker has guardreasoner-vl {answer.version}, this process {__version__}: install the same"
        first = self._opened = self._opened or answer
        same = same_model(first.model, answer.model) and (first.mode, first.settings) == (answer.mode, answer.settings)
        if same:
            return None
        return "the worker's model or calibration differs from another worker's: copy the same to all machines"


def _death(error: Exception) -> str:
    """The probable cause of the death of a worker that had not opened its guard, and the remedy."""
    if "ModuleNotFoundError" in str(error):
        missing = str(error).strip().splitlines()[-1]
        return f"{missing:.200}; install guardreasoner-vl with the extras of this process on all machines"
    return (
        "the worker died while it loaded the model, which may not fit into memory: take a smaller model, or fewer "
        "--workers"
    )
