"""The metrics: for any arguments the series are bounded, can be parsed and add up."""

from __future__ import annotations

import math
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.service.backend import EngineLoad
from guardreasoner_vl.service.metrics import METHODS, OUTCOMES, REASONS, ROUTES, Metrics
from guardreasoner_vl.types import ModelInfo
from guardreasoner_vl.version import __version__

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

GUARDS = ("default", "fast")
ALLOWED = {
    "caller": {"anonymous", "other"},
    "guard": {*GUARDS, "other"},
    "target": {*TARGETS, "other"},
    "outcome": {*OUTCOMES, "other"},
    "reason": {*REASONS, "other"},
    "route": {*ROUTES, "other"},
    "method": {*METHODS, "OTHER"},
    "version": {__version__},
    "status": {"1xx", "2xx", "3xx", "4xx", "5xx", "other"},
}
ANY = st.text() | st.sampled_from([*GUARDS, *TARGETS, *OUTCOMES, *REASONS, *ROUTES, *METHODS])
# No clock gives 1e300 seconds; the sum of a list of them would still be finite.
NUMBERS = st.floats(-1e300, 1e300) | st.sampled_from([math.nan, math.inf, -math.inf]) | st.integers(-(10**30), 10**30)


def samples(metrics: Metrics) -> list[Sample]:
    body, kind = metrics.render()
    assert kind.startswith("text/plain")
    families = list(text_string_to_metric_families(body.decode("utf-8")))
    return [sample for family in families for sample in family.samples]


def value(metrics: Metrics, name: str, **labels: str) -> float:
    (measured,) = [sample.value for sample in samples(metrics) if sample.name == name and sample.labels == labels]
    return measured


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ANY, ANY, ANY, NUMBERS, st.integers()), min_size=1, max_size=8))
def test_labels_are_bounded_whatever_is_passed(calls: list[tuple[str, str, str, float, int]]) -> None:
    metrics = Metrics(GUARDS)
    for guard, target, outcome, number, whole in calls:
        metrics.verdict(guard, target, outcome, number, whole)
        metrics.request(guard, target, whole, number)
        metrics.let_through(guard, target)
        metrics.refused(outcome)
    measured = [sample for sample in samples(metrics) if not sample.name.startswith("process_")]
    assert all(sample.name.startswith("guardreasoner_") for sample in measured)
    for sample in measured:
        for label, said in sample.labels.items():
            assert label == "le" or said in ALLOWED[label]
        assert math.isfinite(sample.value)
    for name in ("verdicts_total", "verdict_seconds_count", "http_requests_total", "http_request_seconds_count"):
        assert sum(sample.value for sample in measured if sample.name == f"guardreasoner_{name}") == len(calls)


def test_verdicts_add_up() -> None:
    metrics = Metrics(GUARDS)
    metrics.verdict("default", "request", "allow", 0.2, 10)
    metrics.verdict("default", "request", "allow", 0.3, 5)
    metrics.verdict("default", "request", "would_block", 3.0, 7)
    metrics.verdict("fast", "response", "error", 0.0, 0)
    labels = {"guard": "default", "target": "request"}
    assert value(metrics, "guardreasoner_verdicts_total", outcome="allow", **labels) == 2
    assert value(metrics, "guardreasoner_verdicts_total", outcome="would_block", **labels) == 1
    assert value(metrics, "guardreasoner_verdict_seconds_sum", **labels) == pytest.approx(3.5)
    assert value(metrics, "guardreasoner_verdict_seconds_bucket", le="0.25", **labels) == 1
    assert value(metrics, "guardreasoner_verdict_seconds_bucket", le="+Inf", **labels) == 3
    assert value(metrics, "guardreasoner_completion_tokens_total", **labels) == 22
    assert value(metrics, "guardreasoner_verdicts_total", guard="fast", target="response", outcome="error") == 1


def test_requests_are_counted_by_template_method_and_class() -> None:
    metrics = Metrics()
    metrics.request("/v1/guard", "POST", 200, 0.1)
    metrics.request("/v1/guard", "POST", 204, 0.1)
    metrics.request("/v1/guard", "POST", 429, 0.1)
    metrics.request("/v1/guard/of-somebody?text=secret", "BREW", 99, 0.1)
    total = "guardreasoner_http_requests_total"
    assert value(metrics, total, route="/v1/guard", method="POST", status="2xx") == 2
    assert value(metrics, total, route="/v1/guard", method="POST", status="4xx") == 1
    assert value(metrics, total, route="other", method="OTHER", status="other") == 1
    assert b"secret" not in metrics.render()[0]


def test_one_guard_called_default_is_known_without_being_named() -> None:
    metrics = Metrics()
    metrics.let_through("default", "request")
    metrics.let_through("fast", "request")
    assert value(metrics, "guardreasoner_let_through_total", guard="default", target="request") == 1
    assert value(metrics, "guardreasoner_let_through_total", guard="other", target="request") == 1


def test_version_and_loaded_models_are_shown() -> None:
    metrics = Metrics(GUARDS)
    assert value(metrics, "guardreasoner_build_info", version=__version__) == 1
    metrics.models({"default": ModelInfo(name="3b", revision="ab12"), "fast": ModelInfo(name="served")})
    assert value(metrics, "guardreasoner_model_info", guard="default", model="3b", revision="ab12") == 1
    assert value(metrics, "guardreasoner_model_info", guard="fast", model="served", revision="") == 1


def test_alarms_have_their_series_from_the_start() -> None:
    metrics = Metrics(GUARDS)
    for reason in REASONS:
        assert value(metrics, "guardreasoner_refused_total", reason=reason) == 0
    for guard in GUARDS:
        for target in TARGETS:
            assert value(metrics, "guardreasoner_let_through_total", guard=guard, target=target) == 0
        assert value(metrics, "guardreasoner_in_flight", guard=guard) == 0
    metrics.refused("deadline")
    metrics.refused("something new")
    assert value(metrics, "guardreasoner_refused_total", reason="deadline") == 1
    assert value(metrics, "guardreasoner_refused_total", reason="other") == 1


def test_gauges_are_by_guard() -> None:
    metrics = Metrics(GUARDS)
    metrics.in_flight("default", 5)
    metrics.in_flight("fast", 2)
    metrics.engine_up({"default": True, "fast": False})
    for guard, count, up in (("default", 5, 1), ("fast", 2, 0)):
        assert value(metrics, "guardreasoner_in_flight", guard=guard) == count
        assert value(metrics, "guardreasoner_engine_up", guard=guard) == up


def test_the_load_of_engines_is_by_guard() -> None:
    metrics = Metrics(GUARDS)
    metrics.engine_load({"default": EngineLoad(3, 4_000), "fast": EngineLoad(1)})
    assert value(metrics, "guardreasoner_engine_queue_length", guard="default") == 3
    assert value(metrics, "guardreasoner_engine_queue_length", guard="fast") == 1
    assert value(metrics, "guardreasoner_engine_resident_bytes", guard="default") == 4_000
    metrics.engine_load({"default": EngineLoad(), "fast": EngineLoad()})
    assert not [sample for sample in samples(metrics) if sample.name == "guardreasoner_engine_resident_bytes"]


def test_no_series_says_when_another_was_created() -> None:
    metrics = Metrics()
    metrics.verdict("default", "request", "allow", 0.2, 10)
    assert not [sample.name for sample in samples(metrics) if sample.name.endswith("_created")]


def test_plain_counters() -> None:
    metrics = Metrics()
    for count, add in enumerate(
        (metrics.cache_hit, metrics.deduplicated, metrics.engine_restarted, metrics.audit_failed), 1
    ):
        for _ in range(count):
            add()
    measured = {sample.name: sample.value for sample in samples(metrics) if not sample.labels}
    expected = {
        "cache_hits_total": 1,
        "deduplicated_total": 2,
        "engine_restarts_total": 3,
        "audit_failures_total": 4,
    }
    assert {name: measured[f"guardreasoner_{name}"] for name in expected} == expected


def test_each_has_a_registry_of_its_own() -> None:
    first, second = Metrics(), Metrics()
    first.cache_hit()
    assert value(second, "guardreasoner_cache_hits_total") == 0
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("guardreasoner_")]


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def work() -> None:
        for number in range(200):
            metrics.verdict("default", TARGETS[number % 2], "allow", 0.1, 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    measured = Counter(
        {s.labels["target"]: int(s.value) for s in samples(metrics) if s.name == "guardreasoner_verdicts_total"}
    )
    assert measured == {"request": 400, "response": 400}
