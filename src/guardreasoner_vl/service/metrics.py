"""Prometheus metrics: counts and times with labels from fixed lists.

A label value outside its list is counted as `other`, so that no caller can increase the number of time series.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.service.callers import ANONYMOUS
from guardreasoner_vl.service.page import FILES
from guardreasoner_vl.version import __version__

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from guardreasoner_vl.service.backend import EngineLoad
    from guardreasoner_vl.types import ModelInfo

ROUTES = (
    *FILES,
    "/healthz",
    "/readyz",
    "/metrics",
    "/v1/models",
    "/v1/guard",
    "/v1/guard/stream",
    "/v1/moderations",
    "/v1/chat/completions",
    "/beta/litellm_basic_guardrail_api",
)
OUTCOMES = ("allow", "block", "error", "would_block")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
REASONS = (
    "queue_full",
    "caller_busy",
    "rate_limited",
    "engine_down",
    "too_large",
    "bodies_full",
    "too_slow",
    "unauthorised",
    "bad_host",
    "bad_origin",
    "deadline",
)
OTHER = "other"

_VERDICT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_REQUEST_SECONDS = (0.001, 0.005, *_VERDICT_SECONDS)


class Metrics:
    """The metrics of one service in their own registry; no method raises, whatever a caller sent.

    `guards` are the configured names; `callers` may be reassigned.
    """

    def __init__(self, guards: Collection[str] = ("default",)) -> None:
        self._guards = frozenset(guards)
        self.callers: Collection[str] = (ANONYMOUS,)
        registry = self._registry = CollectorRegistry()
        # For the whole process: prometheus_client has no switch for one registry.
        disable_created_metrics()  # type: ignore[no-untyped-call]

        def counter(name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"guardreasoner_{name}", help_text, labels, registry=registry)

        def gauge(name: str, help_text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"guardreasoner_{name}", help_text, labels, registry=registry)

        def histogram(name: str, help_text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
            return Histogram(f"guardreasoner_{name}", help_text, labels, registry=registry, buckets=buckets)

        guard_and_target = ("guard", "target")
        self._verdicts = counter("verdicts_total", "Verdicts given.", (*guard_and_target, "outcome"))
        self._verdict_seconds = histogram(
            "verdict_seconds", "Seconds from admission to verdict.", guard_and_target, _VERDICT_SECONDS
        )
        self._tokens = counter("completion_tokens_total", "Tokens that the guards wrote.", guard_and_target)
        self._quotes = counter(
            "unsupported_quotes_total",
            "Quotes removed from reasoning because the input does not contain them.",
            ("guard",),
        )
        self._let_through = counter(
            "let_through_total", "Exchanges allowed without a verdict, by the operator's settings.", guard_and_target
        )
        self._refused = counter("refused_total", "Requests refused without a verdict.", ("reason",))
        self._callers_verdicts = counter("caller_verdicts_total", "Verdicts given to a caller.", ("caller", "outcome"))
        self._callers_refused = counter(
            "caller_refused_total", "Requests of a caller refused without a verdict.", ("caller", "reason")
        )
        self._requests = counter("http_requests_total", "Requests answered.", ("route", "method", "status"))
        self._request_seconds = histogram(
            "http_request_seconds", "Seconds to answer a request.", ("route",), _REQUEST_SECONDS
        )
        self._in_flight = gauge("in_flight", "Exchanges admitted and not yet answered.", ("guard",))
        self._engine_up = gauge("engine_up", "1 if the guard is ready at the scrape, else 0.", ("guard",))
        self._engine_queue = gauge(
            "engine_queue_length", "Exchanges that the guard's engine was given and has not answered.", ("guard",)
        )
        self._engine_memory = gauge(
            "engine_resident_bytes", "Resident memory of the guard's engine process in bytes.", ("guard",)
        )
        self._cache_hits = counter("cache_hits_total", "Verdicts from the cache.")
        self._deduplicated = counter(
            "deduplicated_total", "Exchanges that shared the verdict of an identical one in flight."
        )
        self._engine_restarts = counter("engine_restarts_total", "Restarts of the engine.")
        self._audit_failures = counter("audit_failures_total", "Audit lines that could not be written.")
        self._model = gauge(
            "model_info", "1 for the model of each guard that is loaded.", ("guard", "model", "revision")
        )
        gauge("build_info", "1 for the version of the package.", ("version",)).labels(__version__).set(1)
        ProcessCollector(registry=registry)
        for reason in REASONS:  # from 0: a series that starts at 1 shows no increase to an alert
            self._refused.labels(reason)
        for guard in self._guards:
            self._quotes.labels(guard)
            self._in_flight.labels(guard)
            for target in TARGETS:
                self._let_through.labels(guard, target)

    def verdict(
        self,
        guard: str,
        target: str,
        outcome: str,
        seconds: float,
        completion_tokens: int,
        caller: str = ANONYMOUS,
    ) -> None:
        """Count a verdict; `outcome` is `would_block` for a block in monitor mode."""
        labels = self._guard_and_target(guard, target)
        self._callers_verdicts.labels(_known_or_other(caller, self.callers), _known_or_other(outcome, OUTCOMES)).inc()
        self._verdicts.labels(*labels, _known_or_other(outcome, OUTCOMES)).inc()
        self._verdict_seconds.labels(*labels).observe(_amount(seconds))
        self._tokens.labels(*labels).inc(_amount(completion_tokens))

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count an answered request; `route` is its path template, never the path."""
        known = _known_or_other(route, ROUTES)
        kind = f"{status // 100}xx" if 100 <= status < 600 else OTHER
        self._requests.labels(known, _known_or_other(method, METHODS, "OTHER"), kind).inc()
        self._request_seconds.labels(known).observe(_amount(seconds))

    def unsupported_quotes(self, guard: str, count: int) -> None:
        """Count quotes removed from a verdict's reasoning."""
        self._quotes.labels(_known_or_other(guard, self._guards)).inc(_amount(count))

    def let_through(self, guard: str, target: str) -> None:
        """Count an exchange allowed without a verdict by the operator's settings."""
        self._let_through.labels(*self._guard_and_target(guard, target)).inc()

    def refused(self, reason: str, caller: str = ANONYMOUS) -> None:
        """Count a request refused without a verdict."""
        self._refused.labels(_known_or_other(reason, REASONS)).inc()
        self._callers_refused.labels(_known_or_other(caller, self.callers), _known_or_other(reason, REASONS)).inc()

    def in_flight(self, guard: str, count: int) -> None:
        """Set the number of a guard's exchanges admitted and not yet answered."""
        self._in_flight.labels(_known_or_other(guard, self._guards)).set(count)

    def engine_up(self, ready: Mapping[str, bool]) -> None:
        """Set whether each guard is ready."""
        for guard, is_ready in ready.items():
            self._engine_up.labels(_known_or_other(guard, self._guards)).set(is_ready)

    def engine_load(self, loads: Mapping[str, EngineLoad]) -> None:
        """Set the queue and the memory of each guard's engine; unknown memory has no series."""
        self._engine_memory.clear()
        for guard, load in loads.items():
            known = _known_or_other(guard, self._guards)
            self._engine_queue.labels(known).set(load.queue_length)
            if load.resident_bytes is not None:
                self._engine_memory.labels(known).set(load.resident_bytes)

    def cache_hit(self) -> None:
        """Count a verdict from the cache."""
        self._cache_hits.inc()

    def deduplicated(self) -> None:
        """Count an exchange that shares the verdict of an identical one in flight."""
        self._deduplicated.inc()

    def engine_restarted(self) -> None:
        """Count a restart of an engine."""
        self._engine_restarts.inc()

    def audit_failed(self) -> None:
        """Count an audit line that could not be written."""
        self._audit_failures.inc()

    def models(self, models: Mapping[str, ModelInfo]) -> None:
        """Set the loaded models, by guard."""
        for guard, model in models.items():
            self._model.labels(guard, model.name, model.revision or "").set(1)

    def render(self) -> tuple[bytes, str]:
        """The body and the content type of the answer to a scrape."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _guard_and_target(self, guard: str, target: str) -> tuple[str, str]:
        return _known_or_other(guard, self._guards), _known_or_other(target, TARGETS)


def _known_or_other(value: str, allowed: Collection[str], other: str = OTHER) -> str:
    return value if value in allowed else other


def _amount(value: float) -> float:
    """The value, or 0 if it is negative or not finite: a counter cannot decrease, and NaN would persist in its sum."""
    return value if math.isfinite(value) and value > 0 else 0.0
