"""The engine's own process: exchanges come in through a pipe, verdicts and pieces of reasoning go out.

All that waits is judged together (`Guard.moderate_from`), so that concurrent requests share the model's batches, and
what arrives joins between two of them. A crash, or a kill, takes nothing with it but the exchanges at hand
(`service.process`).
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
from guardreasoner_vl.guard import Asked, Guard
from guardreasoner_vl.service.logs import configure

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.types import Exchange, Mode, ModelInfo, Verdict


_KERNELS = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""On the CPU torch keeps what it prepared for each shape of a product, a quarter of a megabyte each, 1,024 of them by
default and in two caches; prompts differ in length, so that they fill up. Measured: docs/service.md."""

_NICENESS = 5
"""Where the model keeps all cores busy, the service's own process comes first: probes and refusals do not wait."""


@dataclass(frozen=True)
class Opening:
    """What the process opens: a model (`Guard.load`), its engine's options, and the policy."""

    model: str
    revision: str | None
    policy: Policy
    options: dict[str, Any]
    log_level: str = "WARNING"

    def guard(self) -> Guard:
        """The guard itself; raises `ModelError`."""
        return Guard.load(self.model, revision=self.revision, policy=self.policy, **self.options)


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    model: ModelInfo
    settings: dict[str, Any]


@dataclass(frozen=True)
class Broken:
    """The model cannot be loaded."""

    message: str


@dataclass(frozen=True)
class Job:
    """One exchange to be judged; `streamed` asks for the answer's text as it comes."""

    number: int
    exchange: Exchange
    mode: Mode | None
    streamed: bool


@dataclass(frozen=True)
class CallOff:
    """Nobody waits for that job any more."""

    number: int


@dataclass(frozen=True)
class Piece:
    """More of a job's answer; None: the answer begins anew."""

    number: int
    text: str | None


@dataclass(frozen=True)
class Done:
    """A job's verdict."""

    number: int
    verdict: Verdict


def run(connection: Connection, opening: Opening, most: int) -> None:
    """Serve jobs until the pipe is closed; at most `most` calls are put to the model together."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # of a terminal or a process group, meant for the service
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)  # the service ends us, once it has answered all
    configure(opening.log_level)
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    os.environ.update(_KERNELS | os.environ)  # of this process alone; read when torch multiplies first
    try:
        guard = opening.guard()
    except GuardError as error:
        connection.send(Broken(str(error)))
        return
    gc.freeze()
    connection.send(Ready(guard.model, guard.settings))
    inbox = _Inbox(connection)

    def more(under_way: int) -> list[tuple[Asked, Callable[[Verdict], None]]]:
        jobs = inbox.take(wait=not under_way)
        return [
            (Asked(job.exchange, job.mode, _PipeWatch(job, connection, inbox)), partial(done, job.number))
            for job in jobs
        ]

    def done(number: int, verdict: Verdict) -> None:
        inbox.forget(number)
        connection.send(Done(number, verdict))

    guard.moderate_from(more, most)


class _Inbox:
    """What has arrived and waits, and which jobs were called off; a thread of its own reads the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[Job] = deque()
        self._under_way: set[int] = set()
        self._called_off: set[int] = set()
        self._arrived = threading.Condition()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def take(self, wait: bool) -> list[Job]:
        """All that waits, one job at least if there is nothing else to do."""
        with self._arrived:
            while wait and not self._waiting:
                self._arrived.wait()
            jobs = list(self._waiting)
            self._waiting.clear()
            self._under_way.update(job.number for job in jobs)
            return jobs

    def is_called_off(self, number: int) -> bool:
        return number in self._called_off

    def forget(self, number: int) -> None:
        """The job is over."""
        with self._arrived:
            self._under_way.discard(number)
            self._called_off.discard(number)

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # the service is gone, and nobody waits for what is at hand
            with self._arrived:
                self._take_in(message)
                self._arrived.notify()

    def _take_in(self, message: Job | CallOff) -> None:
        if isinstance(message, Job):
            self._waiting.append(message)
        elif message.number in self._under_way:
            self._called_off.add(message.number)
        else:
            self._waiting = deque(job for job in self._waiting if job.number != message.number)


class _PipeWatch:
    """Tells a job's answer through the pipe."""

    def __init__(self, job: Job, connection: Connection, inbox: _Inbox) -> None:
        self._job, self._connection, self._inbox = job, connection, inbox

    def begin(self) -> None:
        if self._job.streamed:
            self._connection.send(Piece(self._job.number, None))

    def tell(self, text: str) -> None:
        if self._job.streamed:
            self._connection.send(Piece(self._job.number, text))

    @property
    def called_off(self) -> bool:
        return self._inbox.is_called_off(self._job.number)
