"""Where every exchange of the service is judged: admitted or refused, looked up among known verdicts or asked about
once, within its deadline; then the operator's settings decide what is done, and it is counted and written down.

Whatever goes wrong with an exchange that was accepted is an `error` verdict, and an error blocks unless the operator
chose to fail open.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import EngineError, GuardError
from guardreasoner_vl.judging.judge import error_verdict
from guardreasoner_vl.service.callers import Callers, QueueFullError, RefusedError
from guardreasoner_vl.service.config import DEFAULT, STAGES
from guardreasoner_vl.service.enforcement import enforced, stages_of
from guardreasoner_vl.service.readiness import Readiness
from guardreasoner_vl.service.turnstile import Turnstile
from guardreasoner_vl.service.verdict_cache import VerdictCache, cache_key, digest_of
from guardreasoner_vl.types import Exchange

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from guardreasoner_vl.engines.base import Watch
    from guardreasoner_vl.service.audit import AuditLog
    from guardreasoner_vl.service.backend import Backend
    from guardreasoner_vl.service.callers import Origin
    from guardreasoner_vl.service.config import ServiceConfig, Stage
    from guardreasoner_vl.service.metrics import Metrics
    from guardreasoner_vl.types import Mode, Verdict

_log = logging.getLogger(__name__)
PROBE = Exchange("Hello.")
"""The exchange that tests whether an idle guard judges."""


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
        self,
        backends: Mapping[str, Backend],
        config: ServiceConfig,
        metrics: Metrics,
        audit: AuditLog | None,
        callers: Callers | None = None,
    ) -> None:
        self._backends, self._config, self._metrics, self._audit = backends, config, metrics, audit
        self._callers = callers or Callers(config)
        self._accepted = dict.fromkeys(backends, 0)
        self._shared: dict[str, _Shared] = {}
        self._turnstile = Turnstile()
        self._known = VerdictCache(config.cache.entries, config.cache.seconds)
        self._readiness = {
            name: Readiness(partial(self._asked, name, PROBE, None, None), config.limits.ready_seconds)
            for name in backends
        }

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
        """Raises what `judge` would raise before it judges, except for refusals by the caller's own limits."""
        self._admit(*self.backend(guard))

    async def judge(
        self,
        exchange: Exchange,
        origin: Origin,
        *,
        guard: str | None = None,
        mode: Mode | None = None,
        watch: Watch | None = None,
        side: Stage | None = None,
    ) -> Verdict:
        """The verdict and the action to take. Raises `RefusedError` if the exchange is not accepted.

        An error counts for the part `side` (the request, or the response) alone; without `side` it counts for every
        part that the exchange has.
        """
        name, backend = self.backend(guard)
        with self._place(name, backend, origin):
            started = time.perf_counter()
            digest = digest_of(exchange)
            raw, cached = await self._looked_up(name, backend, exchange, mode, watch, digest)
            await self._turnstile.enter()  # a batch of the engine comes back at once
        stages = (side,) if side else stages_of(exchange)
        verdict = self._decided(raw, name, stages)
        self._counted(raw, verdict, name, stages, origin, time.perf_counter() - started, cached)
        await self._written(verdict, digest, origin, stages, exchange, cached)
        return verdict

    async def unjudged(
        self, error: GuardError, origin: Origin, guard: str | None = None, side: Stage | None = None
    ) -> Verdict:
        """The error verdict about a body that holds no exchange; it fails open if `side` does, or both stages do."""
        name, backend = self.backend(guard)
        stages = (side,) if side else STAGES
        raw = error_verdict(error, backend.policy, backend.model)
        verdict = self._decided(raw, name, stages)
        self._counted(raw, verdict, name, stages, origin, 0.0, cached=False)
        await self._written(verdict, "", origin, stages, None, cached=False)
        return verdict

    def begin(self) -> None:
        """Test in the background whether the guards judge."""
        for readiness in self._readiness.values():
            readiness.prove()

    def state(self) -> str:
        """`ready`, or what keeps the service from judging: `not ready`, `queue full`. Never waits."""
        judges = [
            readiness.is_ready(up=self._backends[name].is_up, idle=not self._accepted[name])
            for name, readiness in self._readiness.items()
        ]
        self._metrics.engine_up(all(judges))
        if not all(judges):
            return "not ready"
        full = any(accepted >= self._config.limits.queue for accepted in self._accepted.values())
        return "queue full" if full else "ready"

    async def close(self) -> None:
        """Free all engines."""
        for readiness in self._readiness.values():
            await readiness.close()
        for backend in self._backends.values():
            await backend.close()
        if self._audit:
            self._audit.close()

    @contextmanager
    def _place(self, name: str, backend: Backend, origin: Origin) -> Iterator[None]:
        """Hold one place of the queue and of the caller's, and give it back however the judgement ends."""
        self._admit(name, backend)
        try:
            self._callers.admit(origin.caller, self._config.limits.retry_after)
        except RefusedError as error:
            self._metrics.refused(error.code, origin.caller)
            raise
        self._accepted[name] += 1
        self._count()
        try:
            yield
        finally:
            self._accepted[name] -= 1
            self._callers.release(origin.caller)
            self._count()

    def _admit(self, name: str, backend: Backend) -> None:
        wait = self._config.limits.retry_after
        if not backend.is_up:
            self._metrics.refused("engine_down")
            raise RefusedError("the engine is being started; try again", "engine_down", wait)
        if self._accepted[name] >= self._config.limits.queue:
            self._metrics.refused("queue_full")
            raise QueueFullError("too many exchanges wait; try again", "queue_full", wait)

    def _counted(
        self,
        raw: Verdict,
        verdict: Verdict,
        guard: str,
        stages: Collection[Stage],
        origin: Origin,
        seconds: float,
        cached: bool,
    ) -> None:
        outcome = "error" if raw.error else raw.action if raw.action == verdict.action else "would_block"
        tokens = 0 if cached else raw.usage.completion_tokens
        self._metrics.verdict(guard, _latest(stages), outcome, seconds, tokens, origin.caller)
        if not cached:
            self._metrics.unsupported_quotes(guard, raw.unsupported_quotes)

    async def _written(
        self,
        verdict: Verdict,
        digest: str,
        origin: Origin,
        stages: Collection[Stage],
        exchange: Exchange | None,
        cached: bool,
    ) -> None:
        """Write the audit line, in a thread if it waits for the disk."""
        if self._audit is None:
            return
        record = partial(
            self._audit.record,
            verdict,
            digest=digest,
            origin=origin,
            stage=_latest(stages),
            exchange=exchange,
            cached=cached,
        )
        if self._config.audit.sync:
            await asyncio.shield(asyncio.to_thread(record))
        else:
            record()

    def _count(self) -> None:
        self._metrics.in_flight(sum(self._accepted.values()))

    async def _looked_up(
        self,
        name: str,
        backend: Backend,
        exchange: Exchange,
        mode: Mode | None,
        watch: Watch | None,
        digest: str,
    ) -> tuple[Verdict, bool]:
        """The guard's own verdict, and whether it came from the cache."""
        if watch is not None:  # who watches wants to hear it happen
            return await self._asked(name, exchange, mode, watch), False
        key = cache_key(name, backend, mode, digest)
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
            self._readiness[name].heard(verdict)
            return verdict
        verdict = error_verdict(fault, backend.policy, backend.model)
        self._readiness[name].heard(verdict)
        return verdict

    def _decided(self, raw: Verdict, guard: str, stages: Collection[Stage]) -> Verdict:
        verdict = enforced(raw, stages, self._config)
        if verdict.error is not None and verdict.action == "allow":
            stage = _latest(stages)
            self._metrics.let_through(guard, stage)
            _log.critical(
                "an exchange was let through unjudged",
                extra={"guard": guard, "code": verdict.error.code, "outcome": stage},
            )
        return verdict


def _latest(stages: Collection[Stage]) -> Stage:
    """The stage to count a judgement under: `response` if there is one, for then the answer is about to be released."""
    return "response" if "response" in stages else "request"
