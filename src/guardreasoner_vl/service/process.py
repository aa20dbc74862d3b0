"""The service's side of an engine process: it is started, asked, and started again when it is gone.

A verdict that the process takes with it becomes an `error`; nothing is judged twice.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import queue
import threading
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import EngineError, ModelError
from guardreasoner_vl.service import worker
from guardreasoner_vl.service.worker import Broken, CallOff, Done, Job, Opening, Piece, Ready

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    from guardreasoner_vl.engines.base import Watch
    from guardreasoner_vl.types import Exchange, Mode, Verdict

_log = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a process that is gone is started again; doubled each time it does not come up."""

_END_SECONDS = 5.0


class EngineGoneError(EngineError):
    """The engine's process ended while it worked; another one is on its way."""

    code = "engine_gone"

    def __init__(self) -> None:
        super().__init__("the engine's process ended while it worked; try again")


class EngineProcess:
    """One engine process after another, of which one at most is alive. All methods belong to one event loop.

    `restarted` is called each time a process has to be replaced.
    """

    def __init__(self, opening: Opening, most: int, restarted: Callable[[], None] = lambda: None) -> None:
        self._opening, self._most, self._restarted = opening, most, restarted
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[asyncio.Future[Verdict], Watch | None]] = {}
        self._life: _Life | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.ready: Ready | None = None

    @property
    def pid(self) -> int | None:
        """The process that works now; None while there is none."""
        return self._life.pid if self._life and self.ready else None

    async def start(self) -> Ready:
        """Wait until the model is loaded; raises `ModelError` if it cannot be."""
        ready = await self._begin()
        self._keeper = asyncio.create_task(self._keep())
        return ready

    async def judge(self, exchange: Exchange, mode: Mode | None = None, watch: Watch | None = None) -> Verdict:
        """The verdict; if the caller is cancelled, so is the job. Raises `EngineGoneError`."""
        if self._life is None or self.ready is None:
            raise EngineGoneError
        number = next(self._numbers)
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (future, watch)
        self._life.send(Job(number, exchange, mode, streamed=watch is not None))
        try:
            return await future
        except asyncio.CancelledError:
            if self._life:
                self._life.send(CallOff(number))
            raise
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        """End the process."""
        if self._keeper:
            self._keeper.cancel()
        await self._end()

    async def _begin(self) -> Ready:
        life = self._life = _Life(self._opening, self._most, self._heard)
        first = await life.first
        if isinstance(first, Ready):
            self.ready = first
            return first
        await self._end()
        raise ModelError(first.message) if first else EngineGoneError

    async def _keep(self) -> None:
        while True:
            if self._life:
                await self._life.gone.wait()
            self.ready = None
            for future, _ in self._waiting.values():
                if not future.done():
                    future.set_exception(EngineGoneError())
            _log.critical("the engine's process ended; it is started again")
            self._restarted()
            await self._end()
            await self._come_up()

    async def _come_up(self) -> None:
        pause = FIRST_PAUSE
        while True:
            await asyncio.sleep(pause)
            try:
                await self._begin()
            except (ModelError, EngineError) as error:
                _log.critical("the engine does not come up (%s)", error.code)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                return

    async def _end(self) -> None:
        life, self._life, self.ready = self._life, None, None
        if life:
            await asyncio.to_thread(life.end)

    def _heard(self, message: Done | Piece) -> None:
        future, watch = self._waiting.get(message.number, (None, None))
        if isinstance(message, Piece):
            if watch and message.text is None:
                watch.begin()
            elif watch and message.text is not None:
                watch.tell(message.text)
        elif future and not future.done():
            future.set_result(message.verdict)


class _Life:
    """One process, and the two threads that write to it and read from it.

    `first` is what it said first, None if it ended without a word; `gone` is set when it has ended.
    """

    def __init__(self, opening: Opening, most: int, heard: Callable[[Done | Piece], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self._own, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(target=worker.run, args=(theirs, opening, most), daemon=True)
        self._loop = asyncio.get_running_loop()
        self._heard = heard
        self.first: asyncio.Future[Ready | Broken | None] = self._loop.create_future()
        self.gone = asyncio.Event()
        self._outbox: queue.SimpleQueue[Job | CallOff | None] = queue.SimpleQueue()
        self._process.start()
        theirs.close()  # so that the pipe ends with the process
        for work in (self._read, self._write):
            threading.Thread(target=work, args=(self._own,), name=work.__name__, daemon=True).start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: Job | CallOff) -> None:
        """Never blocks: a thread writes."""
        self._outbox.put(message)

    def end(self) -> None:
        """Blocks until the process is no more."""
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
                self._tell(self._take, connection.recv())
        except (EOFError, OSError):
            self._tell(self._ended)
        finally:
            connection.close()

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:  # the loop is closed, and nobody listens
            return

    def _take(self, message: Ready | Broken | Done | Piece) -> None:
        if isinstance(message, (Ready, Broken)):
            if not self.first.done():
                self.first.set_result(message)
        else:
            self._heard(message)

    def _ended(self) -> None:
        if not self.first.done():
            self.first.set_result(None)
        self.gone.set()
