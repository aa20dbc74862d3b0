"""The service's side of an engine process: start it, send it jobs, and restart it when it ends.

A job whose process ends becomes an `error` verdict; nothing is judged twice.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import os
import queue
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import EngineError, GuardError, ModelError, reason_of
from guardreasoner_vl.service import worker
from guardreasoner_vl.service.worker import (
    CancelJob,
    JobDone,
    JudgeJob,
    LoadFailed,
    ModelLoaded,
    TextChunk,
    WorkerConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    from guardreasoner_vl.engines.base import StreamListener
    from guardreasoner_vl.types import Exchange, Mode, Verdict

_log = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a process that ended is restarted; doubled each time the start fails."""

_END_SECONDS = 5.0


class EngineGoneError(EngineError):
    """The engine's process ended while the job was in progress; it is being restarted."""

    code = "engine_gone"

    def __init__(self) -> None:
        super().__init__("the engine's process ended while it worked; try again")


class EngineProcess:
    """One engine process, restarted when it ends. Call the methods from one event loop only.

    `restarted` is called at each restart.
    """

    def __init__(self, config: WorkerConfig, max_batch_size: int, restarted: Callable[[], None] = lambda: None) -> None:
        self._config, self._max_batch_size, self._restarted = config, max_batch_size, restarted
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[asyncio.Future[Verdict], StreamListener | None]] = {}
        self._handle: _WorkerHandle | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.ready: ModelLoaded | None = None

    @property
    def pid(self) -> int | None:
        """The id of the process that serves jobs now; None while there is none."""
        return self._handle.pid if self._handle and self.ready else None

    @property
    def queue_length(self) -> int:
        """Number of exchanges that were sent to the process and are not answered."""
        return len(self._waiting)

    @property
    def resident_bytes(self) -> int | None:
        """Resident memory of the process that serves jobs now; None without one, or where the system has no `/proc`."""
        return None if self.pid is None else _resident_bytes(self.pid)

    async def start(self) -> ModelLoaded:
        """Start the process and wait until the model is loaded.

        Raises `ModelError` if it cannot be loaded, and `EngineError` if the process cannot be started.
        """
        try:
            ready = await self._spawn()
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or reason_of(error)
            raise EngineError(
                f"the engine's process cannot be started ({reason}): free memory, or allow more processes and files"
            ) from error
        self._supervisor = asyncio.create_task(self._supervise())
        return ready

    async def judge(
        self, exchange: Exchange, mode: Mode | None = None, listener: StreamListener | None = None
    ) -> Verdict:
        """Judge one exchange; cancelling the caller cancels the job. Raises `EngineGoneError`."""
        if self._handle is None or self.ready is None:
            raise EngineGoneError
        number = next(self._numbers)
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (future, listener)
        self._handle.send(JudgeJob(number, exchange, mode, streamed=listener is not None))
        try:
            return await future
        except asyncio.CancelledError:
            if self._handle:
                self._handle.send(CancelJob(number))
            raise
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        """End the process."""
        if self._supervisor:
            self._supervisor.cancel()
        await self._end()

    async def _spawn(self) -> ModelLoaded:
        handle = self._handle = _WorkerHandle(self._config, self._max_batch_size, self._dispatch)
        first_message = await handle.first_message
        if isinstance(first_message, ModelLoaded):
            self.ready = first_message
            return first_message
        await self._end()
        raise ModelError(first_message.message) if first_message else EngineGoneError

    async def _supervise(self) -> None:
        while True:
            if self._handle:
                await self._handle.ended.wait()
            self.ready = None
            for future, _ in self._waiting.values():
                if not future.done():
                    future.set_exception(EngineGoneError())
            _log.critical("the engine's process ended; restarting it")
            self._restarted()
            await self._restart()

    async def _restart(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                await self._end()
                await asyncio.sleep(pause)
                await self._spawn()
            except Exception as error:  # out of memory, files or threads, too: that may pass
                reason = error.code if isinstance(error, GuardError) else getattr(error, "strerror", None)
                _log.critical("the engine's process failed to start (%s)", reason or type(error).__name__)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                return

    async def _end(self) -> None:
        handle, self._handle, self.ready = self._handle, None, None
        if handle:
            await asyncio.to_thread(handle.end)

    def _dispatch(self, message: JobDone | TextChunk) -> None:
        future, listener = self._waiting.get(message.number, (None, None))
        if isinstance(message, TextChunk):
            if listener and message.text is None:
                listener.on_start()
            elif listener and message.text is not None:
                listener.on_text(message.text)
        elif future and not future.done():
            future.set_result(message.verdict)


def _resident_bytes(pid: int) -> int | None:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class _WorkerHandle:
    """One process, and the two threads that write to it and read from it.

    `first_message` is the first message of the process, None if it ended without one; `ended` is set at its end.
    """

    def __init__(
        self, config: WorkerConfig, max_batch_size: int, dispatch: Callable[[JobDone | TextChunk], None]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, worker_end = context.Pipe()
        self._process: SpawnProcess = context.Process(
            target=worker.run_worker, args=(worker_end, config, max_batch_size), daemon=True
        )
        self._loop = asyncio.get_running_loop()
        self._dispatch = dispatch
        self.first_message: asyncio.Future[ModelLoaded | LoadFailed | None] = self._loop.create_future()
        self.ended = asyncio.Event()
        self._outbox: queue.SimpleQueue[JudgeJob | CancelJob | None] = queue.SimpleQueue()
        self._process.start()
        worker_end.close()  # the process then holds the only copy, and its end closes the pipe
        try:
            for work in (self._read, self._write):
                threading.Thread(target=work, args=(self._connection,), name=work.__name__, daemon=True).start()
        except RuntimeError:  # no more threads: nobody would end the process
            self._process.kill()
            raise

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: JudgeJob | CancelJob) -> None:
        """Queue a message for the writing thread; never blocks."""
        self._outbox.put(message)

    def end(self) -> None:
        """Kill the process and wait for its end; blocks."""
        self._outbox.put(None)
        self._process.kill()
        self._process.join(_END_SECONDS)

    def _write(self, connection: Connection) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                connection.send(message)
            except OSError:
                return

    def _read(self, connection: Connection) -> None:
        try:
            while True:
                self._call_on_loop(self._deliver, connection.recv())
        except (EOFError, OSError):
            self._call_on_loop(self._on_end)
        finally:
            connection.close()

    def _call_on_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: no caller waits
            return

    def _deliver(self, message: ModelLoaded | LoadFailed | JobDone | TextChunk) -> None:
        if isinstance(message, (ModelLoaded, LoadFailed)):
            if not self.first_message.done():
                self.first_message.set_result(message)
        else:
            self._dispatch(message)

    def _on_end(self) -> None:
        if not self.first_message.done():
            self.first_message.set_result(None)
        self.ended.set()
