"""The engine's process: reads exchanges from a pipe, writes verdicts and streamed reasoning to it.

All waiting exchanges are judged together (`Guard.moderate_from`), so that concurrent requests share the model's
batches; new ones join between two batches. A crash or a kill loses only the exchanges in progress (`service.process`).
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import GuardError
from guardreasoner_vl.guard import Guard, GuardRequest
from guardreasoner_vl.service.logs import configure

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.types import Exchange, Mode, ModelInfo, Verdict


_KERNELS = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""On the CPU, torch caches one prepared kernel for each shape of a matrix product: about 0.25 MB each, 1,024 entries by
default, in two caches. Prompt lengths vary, so both caches fill up. Measured: docs/service.md."""

_NICENESS = 5
"""Added to the process's niceness, so that on busy cores probes and refusals do not wait for the model."""


@dataclass(frozen=True)
class WorkerConfig:
    """What the process loads: the model, its engine's options (`Guard.load`) and the policy."""

    model: str
    revision: str | None
    policy: Policy
    options: dict[str, Any]
    log_level: str = "WARNING"

    def guard(self) -> Guard:
        """Load the guard. Raises `ModelError`."""
        return Guard.load(self.model, revision=self.revision, policy=self.policy, **self.options)


@dataclass(frozen=True)
class ModelLoaded:
    """The model is loaded."""

    model: ModelInfo
    settings: dict[str, Any]


@dataclass(frozen=True)
class LoadFailed:
    """The model cannot be loaded."""

    message: str


@dataclass(frozen=True)
class JudgeJob:
    """One exchange to judge; `streamed` asks for the text as it is generated."""

    number: int
    exchange: Exchange
    mode: Mode | None
    streamed: bool


@dataclass(frozen=True)
class CancelJob:
    """Request to stop a job: no caller waits for it."""

    number: int


@dataclass(frozen=True)
class TextChunk:
    """The next text of a job; None if the answer starts again, which voids the text so far."""

    number: int
    text: str | None


@dataclass(frozen=True)
class JobDone:
    """A job's verdict."""

    number: int
    verdict: Verdict


def run_worker(connection: Connection, config: WorkerConfig, max_batch_size: int) -> None:
    """Serve jobs until the pipe is closed, with at most `max_batch_size` calls of the model in one batch."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # sent to the process group by a terminal; the service handles them
        if hasattr(signal, name):
            signal.signal(
                getattr(signal, name), signal.SIG_IGN
            )  # the service kills this process once it has answered all
    configure(config.log_level)
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    os.environ.update(_KERNELS | os.environ)  # for this process only; torch reads them at its first product
    try:
        guard = config.guard()
    except GuardError as error:
        connection.send(LoadFailed(str(error)))
        return
    gc.freeze()
    connection.send(ModelLoaded(guard.model, guard.settings))
    job_queue = _JobQueue(connection)

    def more(in_flight: int) -> list[tuple[GuardRequest, Callable[[Verdict], None]]]:
        jobs = job_queue.take(wait=not in_flight)
        return [
            (GuardRequest(job.exchange, job.mode, _PipeListener(job, connection, job_queue)), partial(done, job.number))
            for job in jobs
        ]

    def done(number: int, verdict: Verdict) -> None:
        job_queue.forget(number)
        connection.send(JobDone(number, verdict))

    guard.moderate_from(more, max_batch_size)


class _JobQueue:
    """Jobs that wait, and the numbers of cancelled jobs; a separate thread reads the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[JudgeJob] = deque()
        self._in_flight: set[int] = set()
        self._cancelled: set[int] = set()
        self._arrived = threading.Condition()
        threading.Thread(target=self._read, name="job-queue", daemon=True).start()

    def take(self, wait: bool) -> list[JudgeJob]:
        """Remove and return all waiting jobs; with `wait`, block until there is at least one."""
        with self._arrived:
            while wait and not self._waiting:
                self._arrived.wait()
            jobs = list(self._waiting)
            self._waiting.clear()
            self._in_flight.update(job.number for job in jobs)
            return jobs

    def is_cancelled(self, number: int) -> bool:
        return number in self._cancelled

    def forget(self, number: int) -> None:
        """Drop the state of a finished job."""
        with self._arrived:
            self._in_flight.discard(number)
            self._cancelled.discard(number)

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # the service has ended, so no caller waits for a verdict
            with self._arrived:
                self._accept(message)
                self._arrived.notify()

    def _accept(self, message: JudgeJob | CancelJob) -> None:
        if isinstance(message, JudgeJob):
            self._waiting.append(message)
        elif message.number in self._in_flight:
            self._cancelled.add(message.number)
        else:
            self._waiting = deque(job for job in self._waiting if job.number != message.number)


class _PipeListener:
    """Sends a job's text through the pipe as it is generated."""

    def __init__(self, job: JudgeJob, connection: Connection, job_queue: _JobQueue) -> None:
        self._job, self._connection, self._job_queue = job, connection, job_queue

    def on_start(self) -> None:
        if self._job.streamed:
            self._connection.send(TextChunk(self._job.number, None))

    def on_text(self, text: str) -> None:
        if self._job.streamed:
            self._connection.send(TextChunk(self._job.number, text))

    @property
    def cancelled(self) -> bool:
        return self._job_queue.is_cancelled(self._job.number)
