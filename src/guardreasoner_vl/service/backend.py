"""Backends of the service: a model in a separate process, or a model behind another server."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from guardreasoner_vl.guard import Guard, GuardRequest
from guardreasoner_vl.judging.policy import MAX_WINDOWS
from guardreasoner_vl.service.process import EngineProcess
from guardreasoner_vl.service.worker import WorkerConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.engines.base import StreamListener
    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.service.config import GuardSection
    from guardreasoner_vl.types import Exchange, Mode, ModelInfo, Verdict


class Backend(Protocol):
    """One guard of the service. Call the methods from one event loop only."""

    policy: Policy

    @property
    def model(self) -> ModelInfo: ...

    @property
    def is_up(self) -> bool:
        """Whether it accepts exchanges now."""

    async def start(self) -> None:
        """Load the model. Raises `ModelError` or `EngineError`."""

    async def judge(self, exchange: Exchange, mode: Mode | None, listener: StreamListener | None) -> Verdict:
        """Judge one exchange; cancelling the caller cancels it. Raises `EngineError` if the engine has ended."""

    async def close(self) -> None:
        """Free the engine."""


class LocalBackend:
    """A model in a process of this machine."""

    def __init__(
        self, section: GuardSection, max_batch_size: int, restarted: Callable[[], None], max_windows: int = MAX_WINDOWS
    ) -> None:
        self.policy = replace(section.policy, max_windows=max_windows)
        config = WorkerConfig(section.model, section.revision, self.policy, {"engine": section.engine})
        self._process = EngineProcess(config, max_batch_size, restarted)
        self._model: ModelInfo | None = None

    @property
    def model(self) -> ModelInfo:
        if self._model is None:
            raise RuntimeError("the model is known only after start()")
        return self._model

    @property
    def is_up(self) -> bool:
        return self._process.ready is not None

    @property
    def pid(self) -> int | None:
        return self._process.pid

    async def start(self) -> None:
        self._model = (await self._process.start()).model

    async def judge(self, exchange: Exchange, mode: Mode | None, listener: StreamListener | None) -> Verdict:
        return await self._process.judge(exchange, mode, listener)

    async def close(self) -> None:
        await self._process.close()


class RemoteBackend:
    """A model behind an OpenAI-compatible server, such as vLLM, which does the batching."""

    def __init__(self, section: GuardSection, max_batch_size: int, max_windows: int = MAX_WINDOWS) -> None:
        self.policy = replace(section.policy, max_windows=max_windows)
        self._section, self._max_batch_size = section, max_batch_size
        self._guard: Guard | None = None

    @property
    def model(self) -> ModelInfo:
        return self._opened.model

    @property
    def is_up(self) -> bool:
        return self._guard is not None

    async def start(self) -> None:
        self._guard = await asyncio.to_thread(self._open)

    async def judge(self, exchange: Exchange, mode: Mode | None, listener: StreamListener | None) -> Verdict:
        return await self._opened.amoderate_each(GuardRequest(exchange, mode, listener and _LoopListener(listener)))

    async def close(self) -> None:
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


def make_backend(
    section: GuardSection, max_batch_size: int, restarted: Callable[[], None], max_windows: int = MAX_WINDOWS
) -> Backend:
    """The backend of a configured guard, not started yet; for the two limits see `config.Limits`."""
    if section.is_remote:
        return RemoteBackend(section, max_batch_size, max_windows)
    return LocalBackend(section, max_batch_size, restarted, max_windows)
