"""Who judges: a model in a process of its own, or another server over HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from guardreasoner_vl.guard import Asked, Guard
from guardreasoner_vl.judging.policy import MAX_WINDOWS
from guardreasoner_vl.service.process import EngineProcess
from guardreasoner_vl.service.worker import Opening

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.engines.base import Watch
    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.service.config import GuardSection
    from guardreasoner_vl.types import Exchange, Mode, ModelInfo, Verdict


class Backend(Protocol):
    """One guard of the service. All methods belong to one event loop."""

    policy: Policy

    @property
    def model(self) -> ModelInfo: ...

    @property
    def is_up(self) -> bool:
        """Whether it can take an exchange now."""

    async def start(self) -> None:
        """Raises `ModelError` or `EngineError`."""

    async def judge(self, exchange: Exchange, mode: Mode | None, watch: Watch | None) -> Verdict:
        """The verdict; cancelling it calls the judgement off. Raises `EngineError` if the engine is gone."""

    async def close(self) -> None:
        """Free the engine."""


class OwnProcess:
    """A model on this machine."""

    def __init__(
        self, section: GuardSection, together: int, restarted: Callable[[], None], windows: int = MAX_WINDOWS
    ) -> None:
        self.policy = replace(section.policy, max_windows=windows)
        opening = Opening(section.model, section.revision, self.policy, {"engine": "transformers"})
        self._process = EngineProcess(opening, together, restarted)
        self._model: ModelInfo | None = None

    @property
    def model(self) -> ModelInfo:
        if self._model is None:
            raise RuntimeError("the model's name is known once it has started")
        return self._model

    @property
    def is_up(self) -> bool:
        return self._process.ready is not None

    @property
    def pid(self) -> int | None:
        return self._process.pid

    async def start(self) -> None:
        self._model = (await self._process.start()).model

    async def judge(self, exchange: Exchange, mode: Mode | None, watch: Watch | None) -> Verdict:
        return await self._process.judge(exchange, mode, watch)

    async def close(self) -> None:
        await self._process.close()


class OtherServer:
    """A model behind an OpenAI-compatible server, such as vLLM, which batches by itself."""

    def __init__(self, section: GuardSection, together: int, windows: int = MAX_WINDOWS) -> None:
        self.policy = replace(section.policy, max_windows=windows)
        self._section, self._together = section, together
        self._guard: Guard | None = None

    @property
    def model(self) -> ModelInfo:
        return self._opened.model

    @property
    def is_up(self) -> bool:
        return self._guard is not None

    async def start(self) -> None:
        self._guard = await asyncio.to_thread(self._open)

    async def judge(self, exchange: Exchange, mode: Mode | None, watch: Watch | None) -> Verdict:
        return await self._opened.amoderate_each(Asked(exchange, mode, watch and _OnThisLoop(watch)))

    async def close(self) -> None:
        if self._guard:
            await asyncio.to_thread(self._guard.close)

    @property
    def _opened(self) -> Guard:
        if self._guard is None:
            raise RuntimeError("the server has not been asked yet: start first")
        return self._guard

    def _open(self) -> Guard:
        section = self._section
        options: dict[str, Any] = {"base_url": section.base_url, "max_concurrency": self._together}
        if section.api_key:
            options["api_key"] = section.api_key.get_secret_value()
        return Guard.load(section.model, "openai", policy=self.policy, **options)


class _OnThisLoop:
    """A watch that the engine's own thread may tell; made on the loop that the watch belongs to."""

    def __init__(self, watch: Watch) -> None:
        self._watch, self._loop = watch, asyncio.get_running_loop()

    def begin(self) -> None:
        self._loop.call_soon_threadsafe(self._watch.begin)

    def tell(self, text: str) -> None:
        self._loop.call_soon_threadsafe(self._watch.tell, text)

    @property
    def called_off(self) -> bool:
        return self._watch.called_off


def backend_of(
    section: GuardSection, together: int, restarted: Callable[[], None], windows: int = MAX_WINDOWS
) -> Backend:
    """The guard that a section asks for, not started yet; `together` and `windows` as in `config.Limits`."""
    if section.is_remote:
        return OtherServer(section, together, windows)
    return OwnProcess(section, together, restarted, windows)
