"""Where every exchange of the service is judged: admitted or refused, found among known verdicts or asked about once,
within its deadline; then decided by the operator's settings, counted and written down.

Whatever goes wrong with an exchange that was accepted is an `error` verdict, and an error blocks unless the operator
chose to fail open for that stage.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import EngineError, GuardError
from guardreasoner_vl.images import Picture
from guardreasoner_vl.judging import error_verdict
from guardreasoner_vl.protocol import INSTRUCTION
from guardreasoner_vl.service.config import DEFAULT
from guardreasoner_vl.types import Exchange

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guardreasoner_vl.engines.base import Watch
    from guardreasoner_vl.service.audit import AuditLog
    from guardreasoner_vl.service.backend import Backend
    from guardreasoner_vl.service.config import ServiceConfig, Stage
    from guardreasoner_vl.service.metrics import Metrics
    from guardreasoner_vl.types import ImageSource, Mode, Verdict

_log = logging.getLogger(__name__)
PROBE = Exchange("Hello.")
"""What readiness asks about."""


class RefusedError(GuardError):
    """The service cannot take the exchange now; nothing was judged."""

    status = 503

    def __init__(self, message: str, reason: str, retry_after: int) -> None:
        super().__init__(message)
        self.code, self.retry_after = reason, retry_after


class QueueFullError(RefusedError):
    """Too many exchanges wait."""

    status = 429


class UnknownGuardError(GuardError):
    """The request names a guard that the service does not have."""

    code = "unknown_guard"


class DeadlineError(EngineError):
    """The verdict took longer than it may."""

    code = "deadline"


@dataclass
class _Shared:
    """A judgement that several callers wait for."""

    task: asyncio.Task[Verdict]
    waiting: int = 0


class Desk:
    """All guards of one service. Its methods belong to one event loop."""

    def __init__(
        self, backends: Mapping[str, Backend], config: ServiceConfig, metrics: Metrics, audit: AuditLog | None
    ) -> None:
        self._backends, self._config, self._metrics, self._audit = backends, config, metrics, audit
        self._accepted = dict.fromkeys(backends, 0)
        self._shared: dict[str, _Shared] = {}
        self._known = _Known(config.cache.entries, config.cache.seconds)
        self._judged = dict.fromkeys(backends, -math.inf)

    @property
    def guards(self) -> list[str]:
        """The guards' names, the default one first."""
        return sorted(self._backends, key=lambda name: (name != DEFAULT, name))

    def backend(self, name: str | None) -> tuple[str, Backend]:
        """The guard that a request names; raises `UnknownGuardError`."""
        chosen = name or DEFAULT
        if chosen not in self._backends:
            raise UnknownGuardError(f"there is no such guard: use one of {', '.join(self.guards)}")
        return chosen, self._backends[chosen]

    def check(self, guard: str | None) -> None:
        """Raises what `judge` would raise before it judges."""
        self._admit(*self.backend(guard))

    async def judge(
        self,
        exchange: Exchange,
        request_id: str,
        *,
        guard: str | None = None,
        mode: Mode | None = None,
        watch: Watch | None = None,
    ) -> Verdict:
        """The verdict and the action to take. Raises `RefusedError` if the exchange is not accepted."""
        name, backend = self.backend(guard)
        self._admit(name, backend)
        self._accepted[name] += 1
        self._count()
        started = time.perf_counter()
        digest = digest_of(exchange)
        try:
            raw, cached = await self._found(name, backend, exchange, mode, watch, digest)
        finally:
            self._accepted[name] -= 1
            self._count()
        stage: Stage = "response" if exchange.has_response else "request"
        verdict = self._decided(raw, name, stage)
        self._counted(raw, verdict, name, stage, time.perf_counter() - started, cached)
        if self._audit:
            self._audit.record(
                verdict, digest=digest, request_id=request_id, stage=stage, exchange=exchange, cached=cached
            )
        return verdict

    def unjudged(self, error: GuardError, request_id: str, guard: str | None = None) -> Verdict:
        """The verdict about what is no exchange at all; it fails open only if that is so for both stages."""
        name, backend = self.backend(guard)
        raw = error_verdict(error, backend.policy, backend.model)
        stage: Stage = "request" if self._config.request.on_error == "block" else "response"
        verdict = self._decided(raw, name, stage)
        self._counted(raw, verdict, name, stage, 0.0, cached=False)
        if self._audit:
            self._audit.record(verdict, digest="", request_id=request_id, stage=stage, exchange=None)
        return verdict

    async def is_ready(self) -> bool:
        """Whether every guard judges: each one did some seconds ago, or is asked now."""
        found = all(await asyncio.gather(*map(self._probe, self._backends)))
        self._metrics.engine_up(found)
        return found

    async def close(self) -> None:
        """Free all engines."""
        for backend in self._backends.values():
            await backend.close()
        if self._audit:
            self._audit.close()

    def _admit(self, name: str, backend: Backend) -> None:
        wait = self._config.limits.retry_after
        if not backend.is_up:
            self._metrics.refused("engine_down")
            raise RefusedError("the engine is being started; try again", "engine_down", wait)
        if self._accepted[name] >= self._config.limits.queue:
            self._metrics.refused("queue_full")
            raise QueueFullError("too many exchanges wait; try again", "queue_full", wait)

    def _counted(self, raw: Verdict, verdict: Verdict, guard: str, stage: Stage, seconds: float, cached: bool) -> None:
        outcome = "error" if raw.error else raw.action if raw.action == verdict.action else "would_block"
        self._metrics.verdict(guard, stage, outcome, seconds, 0 if cached else raw.usage.completion_tokens)

    def _count(self) -> None:
        self._metrics.in_flight(sum(self._accepted.values()))

    async def _found(
        self,
        name: str,
        backend: Backend,
        exchange: Exchange,
        mode: Mode | None,
        watch: Watch | None,
        digest: str,
    ) -> tuple[Verdict, bool]:
        """The guard's own verdict, and whether it was known."""
        if watch is not None:  # who watches wants to hear it happen
            return await self._asked(name, exchange, mode, watch), False
        key = _key(name, backend, mode, digest)
        if known := self._known.get(key):
            self._metrics.cache_hit()
            return known, True
        if key in self._shared:
            self._metrics.deduplicated()
        else:
            work = asyncio.create_task(self._asked(name, exchange, mode, None))
            self._shared[key] = _Shared(work)
            work.add_done_callback(partial(self._ended, key, self._shared[key]))
        shared = self._shared[key]
        shared.waiting += 1
        try:
            verdict = await asyncio.shield(shared.task)
        except asyncio.CancelledError:
            if shared.waiting == 1:
                self._ended(key, shared)  # at once: who comes now must not wait for what is given up
                shared.task.cancel()
            raise
        finally:
            shared.waiting -= 1
        if verdict.error is None:
            self._known.keep(key, verdict)
        return verdict, False

    def _ended(self, key: str, shared: _Shared, _: object = None) -> None:
        """Nobody may join the work any more."""
        if self._shared.get(key) is shared:
            del self._shared[key]

    async def _asked(self, name: str, exchange: Exchange, mode: Mode | None, watch: Watch | None) -> Verdict:
        backend, limit = self._backends[name], self._config.limits.seconds
        try:
            async with asyncio.timeout(limit):
                verdict = await backend.judge(exchange, mode, watch)
        except TimeoutError:
            self._metrics.refused("deadline")
            fault: GuardError = DeadlineError(f"no verdict within {limit:g} s; send less, or raise limits.seconds")
        except GuardError as error:
            fault = error
        except Exception as error:
            _log.exception("a judgement failed")
            fault = EngineError(f"the service failed ({type(error).__name__}); its log has the place")
        else:
            if verdict.error is None:
                self._judged[name] = time.monotonic()
            return verdict
        return error_verdict(fault, backend.policy, backend.model)

    def _decided(self, verdict: Verdict, guard: str, stage: Stage) -> Verdict:
        settings = self._config.stage(stage)
        if settings.use == "monitor":
            return verdict.model_copy(update={"action": "allow"})
        if verdict.error is None or settings.on_error == "block":
            return verdict
        self._metrics.let_through(guard, stage)
        _log.critical(
            "an exchange was let through unjudged", extra={"guard": guard, "code": verdict.error.code, "outcome": stage}
        )
        return verdict.model_copy(update={"action": "allow"})

    async def _probe(self, name: str) -> bool:
        backend = self._backends[name]
        if not backend.is_up:
            return False
        if time.monotonic() - self._judged[name] >= self._config.limits.ready_seconds:
            await self._asked(name, PROBE, None, None)
        return time.monotonic() - self._judged[name] < self._config.limits.ready_seconds


class _Known:
    """The latest verdicts, the oldest forgotten first."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._verdicts: OrderedDict[str, tuple[float, Verdict]] = OrderedDict()

    def get(self, key: str) -> Verdict | None:
        since, verdict = self._verdicts.get(key, (0.0, None))
        if verdict is None or time.monotonic() - since > self._seconds:
            return None
        self._verdicts.move_to_end(key)
        return verdict

    def keep(self, key: str, verdict: Verdict) -> None:
        if self._most:
            self._verdicts[key] = (time.monotonic(), verdict)
            if len(self._verdicts) > self._most:
                self._verdicts.popitem(last=False)


def digest_of(exchange: Exchange) -> str:
    """SHA-256 of all that is judged, pictures as they were given."""
    found = hashlib.sha256()
    for turn in (*exchange.history, exchange):
        pictures = [_picture_digest(image) for image in turn.images]
        found.update(json.dumps([turn.prompt, pictures, turn.response]).encode() + b"\n")
    return found.hexdigest()


def _picture_digest(image: ImageSource) -> str:
    if isinstance(image, Picture):
        image = image.png
    if isinstance(image, str):
        image = image.encode()
    if not isinstance(image, bytes):
        raise TypeError(f"the service takes pictures as bytes or data: URLs, not {type(image).__name__}")
    return hashlib.sha256(image).hexdigest()


def _key(guard: str, backend: Backend, mode: Mode | None, digest: str) -> str:
    """All that a verdict depends on: the guard's policy does not change while it lives."""
    parts = [guard, backend.model.name, backend.model.revision, INSTRUCTION, mode or backend.policy.mode, digest]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
