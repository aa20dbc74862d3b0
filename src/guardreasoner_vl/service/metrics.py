"""What Prometheus reads: counts and times, with labels from fixed lists.

Whatever a caller sends, the number of series stays as it is: a value that is on no list is counted as `other`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from guardreasoner_vl.service.callers import ANONYMOUS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

ROUTES = (
    "/",
    "/page.css",
    "/page.js",
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
STAGES = ("request", "response")
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
    """The service's own registry; no method raises for what a caller sent.

    `guards` are the names in the configuration, `routes` the templates of the paths; `callers` may be set anew.
    """

    def __init__(self, guards: Collection[str] = ("default",), routes: Collection[str] = ROUTES) -> None:
        self._guards, self._routes = frozenset(guards), frozenset(routes)
        self.callers: Collection[str] = (ANONYMOUS,)
        registry = self._registry = CollectorRegistry()

        def counter(name: str, told: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"guardreasoner_{name}", told, labels, registry=registry)

        def gauge(name: str, told: str) -> Gauge:
            return Gauge(f"guardreasoner_{name}", told, registry=registry)

        def histogram(name: str, told: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
            return Histogram(f"guardreasoner_{name}", told, labels, registry=registry, buckets=buckets)

        stage = ("guard", "stage")
        self._verdicts = counter("verdicts_total", "Verdicts given.", (*stage, "outcome"))
        self._verdict_seconds = histogram("verdict_seconds", "Seconds from taken to judged.", stage, _VERDICT_SECONDS)
        self._tokens = counter("completion_tokens_total", "Tokens that the guards wrote.", stage)
        self._quotes = counter(
            "unsupported_quotes_total", "Quotes in reasoning that the input does not hold; taken out.", ("guard",)
        )
        self._let_through = counter("let_through_total", "Let through without a verdict, as the operator chose.", stage)
        self._refused = counter("refused_total", "Requests that were not judged.", ("reason",))
        self._callers_verdicts = counter("caller_verdicts_total", "Verdicts given to a caller.", ("caller", "outcome"))
        self._callers_refused = counter(
            "caller_refused_total", "Requests of a caller, not judged.", ("caller", "reason")
        )
        self._requests = counter("http_requests_total", "Requests answered.", ("route", "method", "status"))
        self._request_seconds = histogram(
            "http_request_seconds", "Seconds to answer a request.", ("route",), _REQUEST_SECONDS
        )
        self._in_flight = gauge("in_flight", "Exchanges accepted and not answered.")
        self._engine_up = gauge("engine_up", "1 if every guard judged when it was last asked, else 0.")
        self._cache_hits = counter("cache_hits_total", "Verdicts from the cache.")
        self._deduplicated = counter(
            "deduplicated_total", "Exchanges that shared the verdict of an equal one in flight."
        )
        self._engine_restarts = counter("engine_restarts_total", "Times that the engine was started again.")
        self._audit_failures = counter("audit_failures_total", "Audit lines that could not be written.")
        for reason in REASONS:  # a series that begins at 1 shows no increase to an alarm
            self._refused.labels(reason)
        for guard in self._guards:
            self._quotes.labels(guard)
            for place in STAGES:
                self._let_through.labels(guard, place)

    def verdict(
        self,
        guard: str,
        stage: str,
        outcome: str,
        seconds: float,
        completion_tokens: int,
        caller: str = ANONYMOUS,
    ) -> None:
        """One verdict; `outcome` is `would_block` where a stage only monitors."""
        where = self._where(guard, stage)
        self._callers_verdicts.labels(_known(caller, self.callers), _known(outcome, OUTCOMES)).inc()
        self._verdicts.labels(*where, _known(outcome, OUTCOMES)).inc()
        self._verdict_seconds.labels(*where).observe(_amount(seconds))
        self._tokens.labels(*where).inc(_amount(completion_tokens))

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """One answered request; `route` is the template of its path, never the path."""
        known = _known(route, self._routes)
        kind = f"{status // 100}xx" if 100 <= status < 600 else OTHER
        self._requests.labels(known, _known(method, METHODS, "OTHER"), kind).inc()
        self._request_seconds.labels(known).observe(_amount(seconds))

    def unsupported_quotes(self, guard: str, count: int) -> None:
        """Quotes that were taken out of a verdict's reasoning."""
        self._quotes.labels(_known(guard, self._guards)).inc(_amount(count))

    def let_through(self, guard: str, stage: str) -> None:
        """An exchange passed without a verdict, as the operator chose."""
        self._let_through.labels(*self._where(guard, stage)).inc()

    def refused(self, reason: str, caller: str = ANONYMOUS) -> None:
        """A request was turned away before it was judged."""
        self._refused.labels(_known(reason, REASONS)).inc()
        self._callers_refused.labels(_known(caller, self.callers), _known(reason, REASONS)).inc()

    def in_flight(self, count: int) -> None:
        """How many exchanges are accepted and not answered now."""
        self._in_flight.set(count)

    def engine_up(self, up: bool) -> None:
        """Whether every guard judges."""
        self._engine_up.set(up)

    def cache_hit(self) -> None:
        """A verdict was known."""
        self._cache_hits.inc()

    def deduplicated(self) -> None:
        """An exchange waits for the verdict of an equal one."""
        self._deduplicated.inc()

    def engine_restarted(self) -> None:
        """An engine was gone and is started again."""
        self._engine_restarts.inc()

    def audit_failed(self) -> None:
        """An audit line is lost."""
        self._audit_failures.inc()

    def render(self) -> tuple[bytes, str]:
        """The body and the content type of the answer to a scrape."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _where(self, guard: str, stage: str) -> tuple[str, str]:
        return _known(guard, self._guards), _known(stage, STAGES)


def _known(value: str, known: Collection[str], other: str = OTHER) -> str:
    return value if value in known else other


def _amount(value: float) -> float:
    """A counter cannot go down, and one NaN would spoil its sum for good."""
    return value if math.isfinite(value) and value > 0 else 0.0
