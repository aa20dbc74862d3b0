"""Moderation of one exchange.

    admission -> cache -> in-flight deduplication -> guard, with a deadline -> operator's settings
    -> metrics, log, audit log

A failure after admission becomes an `error` verdict. It blocks, unless it is a fault of the guard and the operator
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

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.errors import EngineError, GuardError
from guardreasoner_vl.judging.judge import error_verdict
from guardreasoner_vl.service.admission import AdmissionGate
from guardreasoner_vl.service.callers import Callers, QueueFullError, RefusedError
from guardreasoner_vl.service.config import DEFAULT
from guardreasoner_vl.service.enforcement import enforced_verdict, present_targets
from guardreasoner_vl.service.readiness import Readiness
from guardreasoner_vl.service.verdict_cache import VerdictCache, cache_key, exchange_digest
from guardreasoner_vl.types import Exchange

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from guardreasoner_vl.engines.base import StreamListener
    from guardreasoner_vl.service.audit import AuditLog
    from guardreasoner_vl.service.backend import Backend, EngineLoad
    from guardreasoner_vl.service.callers import Origin
    from guardreasoner_vl.service.config import ServiceConfig
    from guardreasoner_vl.service.metrics import Metrics
    from guardreasoner_vl.types import Mode, Target, Verdict

_log = logging.getLogger(__name__)
PROBE = Exchange("Hello.")
"""The test exchange of readiness probes."""


class UnknownGuardError(GuardError):
    """The request names a guard that is not configured."""

    code = "unknown_guard"


class DeadlineError(EngineError):
    """No verdict came within `limits.seconds`."""

    code = "deadline"


@dataclass
class _SharedJudgement:
    """A judgement in flight, and how many callers wait for it."""

    task: asyncio.Task[Verdict]
    waiting: int = 0


class ModerationService:
    """All guards of one service. Call its methods from one event loop only."""

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
        self._shared: dict[str, _SharedJudgement] = {}
        self._gate = AdmissionGate()
        self._cache = VerdictCache(config.cache.entries, config.cache.seconds)
        self._readiness = {
            name: Readiness(partial(self._ask_guard, name, PROBE, None, None), config.limits.ready_seconds)
            for name in backends
        }

    @property
    def guards(self) -> list[str]:
        """The guards' names, the default one first."""
        return sorted(self._backends, key=lambda name: (name != DEFAULT, name))

    def backend(self, name: str | None) -> tuple[str, Backend]:
        """The named guard, or the default one. Raises `UnknownGuardError`."""
        chosen = name or DEFAULT
        if chosen not in self._backends:
            raise UnknownGuardError(f"there is no such guard: use one of {', '.join(self.guards)}")
        return chosen, self._backends[chosen]

    def check(self, guard: str | None) -> None:
        """Raise what `judge` would raise before judging, apart from refusals by the caller's own limits."""
        self._admit(*self.backend(guard))

    async def judge(
        self,
        exchange: Exchange,
        origin: Origin,
        *,
        guard: str | None = None,
        mode: Mode | None = None,
        listener: StreamListener | None = None,
        target: Target | None = None,
    ) -> Verdict:
        """Judge one exchange; the verdict holds the action to take. Raises `RefusedError` if it is not admitted.

        An error is attributed to `target` alone; without `target`, to every target that the exchange holds.
        """
        name, backend = self.backend(guard)
        with self._queue_place(name, backend, origin):
            started = time.perf_counter()
            digest = exchange_digest(exchange)
            raw, cached = await self._cached_or_judged(name, backend, exchange, mode, listener, digest)
            await self._gate.enter()  # all verdicts of an engine's batch arrive in one iteration
        targets = (target,) if target else present_targets(exchange)
        verdict = self._enforce(raw, name, targets)
        self._count_and_log(raw, verdict, name, targets, origin, time.perf_counter() - started, cached)
        await self._write_audit(verdict, digest, origin, targets, exchange, cached)
        return verdict

    async def unjudged(
        self, error: GuardError, origin: Origin, guard: str | None = None, target: Target | None = None
    ) -> Verdict:
        """The error verdict for a body without a valid exchange.

        A fault of the guard fails open if the settings of `target` do; without `target`, if those of both targets do.
        """
        name, backend = self.backend(guard)
        targets = (target,) if target else TARGETS
        raw = error_verdict(error, backend.policy, backend.model)
        verdict = self._enforce(raw, name, targets)
        self._count_and_log(raw, verdict, name, targets, origin, 0.0, cached=False)
        await self._write_audit(verdict, "", origin, targets, None, cached=False)
        return verdict

    def start_probes(self) -> None:
        """Send each guard the test exchange, in the background."""
        for readiness in self._readiness.values():
            readiness.start_probe()

    def ready_guards(self) -> dict[str, bool]:
        """Whether each guard judges, without waiting; an idle guard may be sent the test exchange."""
        return {
            name: readiness.is_ready(up=self._backends[name].is_up, idle=not self._accepted[name])
            for name, readiness in self._readiness.items()
        }

    def engine_loads(self) -> dict[str, EngineLoad]:
        """The load of each guard's engine."""
        return {name: backend.load for name, backend in self._backends.items()}

    def state(self) -> str:
        """Readiness without waiting: `ready`, `not ready` or `queue full`."""
        if not all(self.ready_guards().values()):
            return "not ready"
        full = any(accepted >= self._config.limits.queue for accepted in self._accepted.values())
        return "queue full" if full else "ready"

    async def close(self) -> None:
        """Close all guards and the audit log."""
        for readiness in self._readiness.values():
            await readiness.close()
        for backend in self._backends.values():
            await backend.close()
        if self._audit:
            self._audit.close()

    @contextmanager
    def _queue_place(self, name: str, backend: Backend, origin: Origin) -> Iterator[None]:
        """Take a place in the guard's queue and in the caller's limit; release both however the judgement ends."""
        self._admit(name, backend)
        try:
            self._callers.admit(origin.caller, self._config.limits.retry_after)
        except RefusedError as error:
            self._metrics.refused(error.code, origin.caller)
            raise
        self._accepted[name] += 1
        self._metrics.in_flight(name, self._accepted[name])
        try:
            yield
        finally:
            self._accepted[name] -= 1
            self._callers.release(origin.caller)
            self._metrics.in_flight(name, self._accepted[name])

    def _admit(self, name: str, backend: Backend) -> None:
        wait = self._config.limits.retry_after
        if not backend.is_up:
            self._metrics.refused("engine_down")
            raise RefusedError("the engine is being started; try again", "engine_down", wait)
        if self._accepted[name] >= self._config.limits.queue:
            self._metrics.refused("queue_full")
            raise QueueFullError("too many exchanges wait; try again", "queue_full", wait)

    def _count_and_log(
        self,
        raw: Verdict,
        verdict: Verdict,
        guard: str,
        targets: Collection[Target],
        origin: Origin,
        seconds: float,
        cached: bool,
    ) -> None:
        outcome = "error" if raw.error else raw.action if raw.action == verdict.action else "would_block"
        target, tokens = _latest(targets), 0 if cached else raw.usage.completion_tokens
        self._metrics.verdict(guard, target, outcome, seconds, tokens, origin.caller)
        if not cached:
            self._metrics.unsupported_quotes(guard, raw.unsupported_quotes)
        _log.info(
            "verdict",
            extra={
                "request_id": origin.request_id,
                "guard": guard,
                "target": target,
                "outcome": outcome,
                "code": raw.error and raw.error.code,
                "seconds": round(seconds, 4),
            },
        )

    async def _write_audit(
        self,
        verdict: Verdict,
        digest: str,
        origin: Origin,
        targets: Collection[Target],
        exchange: Exchange | None,
        cached: bool,
    ) -> None:
        """Append the audit line, in a thread if each line is synced to disk."""
        if self._audit is None:
            return
        record = partial(
            self._audit.record,
            verdict,
            digest=digest,
            origin=origin,
            target=_latest(targets),
            exchange=exchange,
            cached=cached,
        )
        if self._config.audit.sync:
            await asyncio.shield(asyncio.to_thread(record))
        else:
            record()

    async def _cached_or_judged(
        self,
        name: str,
        backend: Backend,
        exchange: Exchange,
        mode: Mode | None,
        listener: StreamListener | None,
        digest: str,
    ) -> tuple[Verdict, bool]:
        """The guard's own verdict, before enforcement, and whether it came from the cache."""
        if listener is not None:  # a cached or shared verdict has no stream to listen to
            return await self._ask_guard(name, exchange, mode, listener), False
        key = cache_key(name, backend, mode, digest)
        if verdict := self._cache.get(key):
            self._metrics.cache_hit()
            return verdict, True
        if key in self._shared:
            self._metrics.deduplicated()
        else:
            task = asyncio.create_task(self._ask_guard(name, exchange, mode, None))
            self._shared[key] = _SharedJudgement(task)
            task.add_done_callback(partial(self._stop_sharing, key, self._shared[key]))
        shared = self._shared[key]
        shared.waiting += 1
        try:
            verdict = await asyncio.shield(shared.task)
        except asyncio.CancelledError:
            if shared.waiting == 1:
                self._stop_sharing(key, shared)  # now: a new caller must not wait for a cancelled task
                shared.task.cancel()
            raise
        finally:
            shared.waiting -= 1
        if verdict.error is None:
            self._cache.keep(key, verdict)
        return verdict, False

    def _stop_sharing(self, key: str, shared: _SharedJudgement, _: object = None) -> None:
        """Let no further caller join the judgement."""
        if self._shared.get(key) is shared:
            del self._shared[key]

    async def _ask_guard(
        self, name: str, exchange: Exchange, mode: Mode | None, listener: StreamListener | None
    ) -> Verdict:
        backend, limit = self._backends[name], self._config.limits.seconds
        try:
            async with asyncio.timeout(limit):
                verdict = await backend.judge(exchange, mode, listener)
        except TimeoutError:
            self._metrics.refused("deadline")
            failure: GuardError = DeadlineError(f"no verdict within {limit:g} s; send less, or raise limits.seconds")
        except GuardError as error:
            failure = error
        except Exception as error:
            _log.exception("a judgement failed")
            failure = EngineError(f"the service failed ({type(error).__name__}): see its log")
        else:
            self._readiness[name].observe(verdict)
            return verdict
        verdict = error_verdict(failure, backend.policy, backend.model)
        self._readiness[name].observe(verdict)
        return verdict

    def _enforce(self, raw: Verdict, guard: str, targets: Collection[Target]) -> Verdict:
        verdict = enforced_verdict(raw, targets, self._config)
        if verdict.error is not None and verdict.action == "allow":
            target = _latest(targets)
            self._metrics.let_through(guard, target)
            _log.critical(
                "an exchange was let through unjudged",
                extra={"guard": guard, "code": verdict.error.code, "target": target},
            )
        return verdict


def _latest(targets: Collection[Target]) -> Target:
    """The target to count a judgement under: `response` if there is one, since its answer is about to be released."""
    return "response" if "response" in targets else "request"
