"""Backends of the service: a model in a separate process, or a model behind another server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from guardreasoner_vl.guard import Guard, GuardRequest
from guardreasoner_vl.service.process import EngineProcess
from guardreasoner_vl.service.worker import WorkerConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.engines.base import StreamListener
    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.service.config import GuardSection, Limits
    from guardreasoner_vl.types import Exchange, Mode, ModelInfo, Verdict


@dataclass(frozen=True)
class EngineLoad:
    """Exchanges that an engine was given and has not answered, those that it judges now included; resident memory of
    its process in bytes, None if the engine is on another server or the system does not tell."""

    queue_length: int = 0
    resident_bytes: int | None = None


class Backend(Protocol):
    """One guard of the service. Call the methods from one event loop only."""

    policy: Policy

    @property
    def model(self) -> ModelInfo:
        """Name and revision of the model that judges."""

    @property
    def is_up(self) -> bool:
        """Whether the backend accepts exchanges now."""

    @property
    def load(self) -> EngineLoad:
        """What its engine has to do, and the memory that it takes."""

    async def start(self) -> None:
        """Load the model. Raises `ModelError` or `EngineError`."""

    async def judge(self, exchange: Exchange, mode: Mode | None, listener: StreamListener | None) -> Verdict:
        """Judge one exchange; cancelling the caller cancels it. Raises `EngineError` if the engine has ended."""

    async def close(self) -> None:
        """Free the engine."""


class LocalBackend:
    """A model in a process of this machine."""

    def __init__(self, section: GuardSection, limits: Limits, restarted: Callable[[], None]) -> None:
        self.policy = _guard_policy(section, limits)
        config = WorkerConfig(section.model, section.revision, self.policy, {"engine": section.engine})
        self._process = EngineProcess(config, limits.max_batch_size, restarted)
        self._model: ModelInfo | None = None

    @property
    def model(self) -> ModelInfo:
        """Name and revision of the model, known once `start` has returned."""
        if self._model is None:
            raise RuntimeError("the model is known only after start()")
        return self._model

    @property
    def is_up(self) -> bool:
        """Whether the process runs and has loaded the model."""
        return self._process.ready is not None

    @property
    def load(self) -> EngineLoad:
        """The process's queue and its memory."""
        return EngineLoad(self._process.queue_length, self._process.resident_bytes)

    @property
    def pid(self) -> int | None:
        """The id of the process; None while there is none that serves."""
        return self._process.pid

    async def start(self) -> None:
        """Start the process and load the model. Raises `ModelError` or `EngineError`."""
        self._model = (await self._process.start()).model

    async def judge(self, exchange: Exchange, mode: Mode | None, listener: StreamListener | None) -> Verdict:
        """Judge one exchange in the process; cancelling the caller cancels it. Raises `EngineGoneError`."""
        return await self._process.judge(exchange, mode, listener)

    async def close(self) -> None:
        """End the process."""
        await self._process.close()


class RemoteBackend:
    """A model behind an OpenAI-compatible server, such as vLLM, which does the batching."""

    def __init__(self, section: GuardSection, limits: Limits) -> None:
        self.policy = _guard_policy(section, limits)
        self._section, self._max_batch_size = section, limits.max_batch_size
        self._guard: Guard | None = None
        self._unanswered = 0

    @property
    def model(self) -> ModelInfo:
        """Name and revision of the served model, known once `start` has returned."""
        return self._opened.model

    @property
    def is_up(self) -> bool:
        """Whether `start` has connected to the server; a server that fails later is not noticed."""
        return self._guard is not None

    @property
    def load(self) -> EngineLoad:
        """The number of unanswered exchanges; the server's memory is not known."""
        return EngineLoad(self._unanswered)

    async def start(self) -> None:
        """Connect to the server and probe it. Raises `ModelError` or `EngineError`."""
        self._guard = await asyncio.to_thread(self._open)

    async def judge(self, exchange: Exchange, mode: Mode | None, listener: StreamListener | None) -> Verdict:
        """Judge one exchange at the server; cancelling the caller cancels it."""
        self._unanswered += 1
        try:
            return await self._opened.amoderate_each(GuardRequest(exchange, mode, listener and _LoopListener(listener)))
        finally:
            self._unanswered -= 1

    async def close(self) -> None:
        """Close the connections to the server."""
        if self._guard:
            await asyncio.to_thread(self._guard.close)

    @property
    def _opened(self) -> Guard:
        if self._guard is None:
            raise RuntimeError("not connected to the server: call start() first")
        return self._guard

    def _open(self) -> Guard:
        section = self._section
        options: dict[str, Any] = {"base_url": section.base_url, "max_concurrency": self._max_batch_size}
        if section.api_key:
            options["api_key"] = section.api_key.get_secret_value()
        return Guard.load(section.model, "openai", policy=self.policy, **options)


class _LoopListener:
    """Forwards an engine thread's calls to a listener on the event loop where this object was made."""

    def __init__(self, listener: StreamListener) -> None:
        self._listener, self._loop = listener, asyncio.get_running_loop()

    def on_start(self) -> None:
        self._loop.call_soon_threadsafe(self._listener.on_start)

    def on_text(self, text: str) -> None:
        self._loop.call_soon_threadsafe(self._listener.on_text, text)

    @property
    def cancelled(self) -> bool:
        return self._listener.cancelled


def make_backend(section: GuardSection, limits: Limits, restarted: Callable[[], None]) -> Backend:
    """The backend of a configured guard, not started yet; `restarted` is called when its engine is started again."""
    return RemoteBackend(section, limits) if section.is_remote else LocalBackend(section, limits, restarted)


def _guard_policy(section: GuardSection, limits: Limits) -> Policy:
    """The guard's policy with the service's bounds on one exchange."""
    policy = section.policy
    images = replace(policy.images, max_exchange_pixels=limits.exchange_pixels)
    return replace(policy, max_windows=limits.windows, images=images)
