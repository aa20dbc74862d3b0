"""Moderation: admission, deadlines, cached and shared verdicts, and the operator's settings."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.service.audit import AuditLog, AuditSettings
from guardreasoner_vl.service.callers import Origin, QueueFullError, RefusedError
from guardreasoner_vl.service.config import ServiceConfig
from guardreasoner_vl.service.logs import JsonFormatter
from guardreasoner_vl.service.metrics import Metrics
from guardreasoner_vl.service.moderation import ModerationService, UnknownGuardError
from guardreasoner_vl.service.streaming import QueueListener
from guardreasoner_vl.service.verdict_cache import exchange_digest
from guardreasoner_vl.types import Exchange, Turn, Usage
from tests.service.scripted_backend import ScriptedBackend

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.engines.base import StreamListener
    from guardreasoner_vl.types import Mode, Verdict

ID = Origin("0" * 32)


def moderation(backend: ScriptedBackend, audit: AuditLog | None = None, **settings: Any) -> ModerationService:
    metrics = Metrics()
    service = ModerationService({"default": backend}, ServiceConfig(**settings), metrics, audit)
    service.metrics = metrics  # type: ignore[attr-defined]
    return service


def counted(service: ModerationService, name: str, **labels: str) -> float:
    body, _ = service.metrics.render()  # type: ignore[attr-defined]
    samples = [one for family in text_string_to_metric_families(body.decode()) for one in family.samples]
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


async def test_a_verdict() -> None:
    service = moderation(ScriptedBackend())
    assert (await service.judge(Exchange("Hello."), ID)).action == "allow"
    assert (await service.judge(Exchange("A BAD one."), ID)).action == "block"
    broken = await service.judge(Exchange("BROKEN"), ID)
    assert (broken.flagged, broken.action, broken.error is None) == (None, "block", False)
    outcomes = [counted(service, "guardreasoner_verdicts_total", outcome=name) for name in ("allow", "block", "error")]
    assert outcomes == [1, 1, 1]


async def test_quotes_that_the_input_does_not_hold_are_counted_once() -> None:
    service = moderation(ScriptedBackend(reasoning='It says "hello", "mild words" and "kites".'), cache={"entries": 9})
    assert counted(service, "guardreasoner_unsupported_quotes_total", guard="default") == 0
    for _ in range(2):
        verdict = await service.judge(Exchange("Hello."), ID)
        assert (verdict.reasoning, verdict.unsupported_quotes) == ('It says "hello", [\u2026] and [\u2026].', 2)
    assert counted(service, "guardreasoner_unsupported_quotes_total", guard="default") == 2


async def test_a_verdict_is_given_in_the_mode_that_was_asked_for_and_counted_for_its_guard() -> None:
    service = moderation(ScriptedBackend())
    assert (await service.judge(Exchange("Hello."), ID)).mode == "slow"
    assert (await service.judge(Exchange("Hello."), ID, mode="fast")).mode == "fast"
    assert (await service.judge(Exchange("Hello."), ID, mode="fast", listener=QueueListener())).mode == "fast"
    assert counted(service, "guardreasoner_verdicts_total", guard="default", target="request") == 3


async def test_an_unforeseen_error_is_an_error_verdict_that_quotes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(ScriptedBackend):
        async def judge(self, exchange: Exchange, mode: Mode | None, listener: StreamListener | None) -> Verdict:
            raise ValueError("mild words")

    verdict = await moderation(Odd()).judge(Exchange("mild words"), ID)
    assert verdict.error is not None
    assert (verdict.error.code, verdict.action, verdict.flagged) == ("engine", "block", None)
    assert verdict.error.message == "the service failed (ValueError): see its log"
    assert [record.getMessage() for record in caplog.records] == ["a judgement failed"]


async def test_a_full_queue_refuses_and_a_place_becomes_free() -> None:
    service = moderation(ScriptedBackend(pause=0.05), limits={"queue": 2, "retry_after": 7})
    running = [asyncio.create_task(service.judge(Exchange(f"Loaf {number}?"), ID)) for number in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(QueueFullError) as caught:
        await service.judge(Exchange("One more?"), ID)
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (429, "queue_full", 7)
    assert str(caught.value) == "too many exchanges wait; try again"
    assert [one.action for one in await asyncio.gather(*running)] == ["allow", "allow"]
    assert (await service.judge(Exchange("One more?"), ID)).action == "allow"
    assert counted(service, "guardreasoner_refused_total", reason="queue_full") == 1


async def test_an_engine_that_is_down_refuses() -> None:
    backend = ScriptedBackend()
    backend.is_up = False
    service = moderation(backend)
    with pytest.raises(RefusedError) as caught:
        await service.judge(Exchange("Hello."), ID)
    assert (caught.value.status, str(caught.value)) == (
        503,
        "the engine is being started; try again",
    )
    assert service.state() == "not ready"


async def test_a_late_verdict_is_an_error_and_the_work_ends() -> None:
    backend = ScriptedBackend(pause=30)
    service = moderation(backend, limits={"seconds": 0.05})
    verdict = await service.judge(Exchange("Hello."), ID)
    assert verdict.error is not None
    assert (verdict.error.code, verdict.action) == ("deadline", "block")
    assert len(backend.cancelled) == 1


async def test_an_engine_that_goes_is_an_error() -> None:
    backend = ScriptedBackend()
    backend.gone = True
    verdict = await moderation(backend).judge(Exchange("Hello."), ID)
    assert verdict.error is not None
    assert (verdict.error.code, verdict.action) == ("engine_gone", "block")


async def test_who_leaves_ends_the_work() -> None:
    backend = ScriptedBackend(pause=30)
    service = moderation(backend)
    task = asyncio.create_task(service.judge(Exchange("Hello."), ID))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert len(backend.cancelled) == 1
    assert counted(service, "guardreasoner_in_flight") == 0


async def test_equal_exchanges_at_once_are_judged_once() -> None:
    backend = ScriptedBackend(pause=0.05)
    service = moderation(backend)
    verdicts = await asyncio.gather(*(service.judge(Exchange("Hello."), ID) for _ in range(5)))
    assert len(backend.judged) == 1
    assert {one.action for one in verdicts} == {"allow"}
    assert counted(service, "guardreasoner_deduplicated_total") == 4
    await service.judge(Exchange("Hello."), ID)  # nothing is kept by default
    assert len(backend.judged) == 2


async def test_the_first_of_equal_ones_may_leave() -> None:
    backend = ScriptedBackend(pause=0.05)
    service = moderation(backend)
    first = asyncio.create_task(service.judge(Exchange("Hello."), ID))
    second = asyncio.create_task(service.judge(Exchange("Hello."), ID))
    await asyncio.sleep(0.01)
    first.cancel()
    assert (await second).action == "allow"
    assert (len(backend.judged), len(backend.cancelled)) == (1, 0)


async def test_the_work_ends_when_the_last_of_equal_ones_leaves() -> None:
    backend = ScriptedBackend(pause=30)
    service = moderation(backend)
    tasks = [asyncio.create_task(service.judge(Exchange("Hello."), ID)) for _ in range(3)]
    await asyncio.sleep(0.01)
    cancelled = []
    for task in tasks:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        cancelled.append(len(backend.cancelled))
    assert cancelled == [0, 0, 1]


async def test_who_comes_when_the_only_one_has_left_is_judged_anew() -> None:
    backend = ScriptedBackend(pause=0.05)
    service = moderation(backend)
    first = asyncio.create_task(service.judge(Exchange("Hello."), ID))
    await asyncio.sleep(0.01)
    first.cancel()
    second = asyncio.create_task(service.judge(Exchange("Hello."), ID))
    assert (await second).action == "allow"
    third, fourth = await asyncio.gather(*(service.judge(Exchange("Hello."), ID) for _ in range(2)))
    assert (third.action, fourth.action, len(backend.judged), len(backend.cancelled)) == ("allow", "allow", 3, 1)


async def test_known_verdicts_are_given_again_but_never_errors() -> None:
    backend = ScriptedBackend()
    service = moderation(backend, cache={"entries": 2})
    for text in ("one", "one", "BROKEN", "BROKEN", "two", "three", "one"):
        await service.judge(Exchange(text), ID)
    assert [one.prompt for one in backend.judged] == ["one", "BROKEN", "BROKEN", "two", "three", "one"]
    assert counted(service, "guardreasoner_cache_hits_total") == 1
    await service.judge(Exchange("one"), ID, mode="fast")
    await service.judge(Exchange("one"), ID, listener=QueueListener())
    assert len(backend.judged) == 8


async def test_known_verdicts_grow_old() -> None:
    backend = ScriptedBackend()
    service = moderation(backend, cache={"entries": 2, "seconds": 0.01})
    await service.judge(Exchange("one"), ID)
    await asyncio.sleep(0.02)
    await service.judge(Exchange("one"), ID)
    assert len(backend.judged) == 2


async def test_monitoring_lets_everything_pass_and_counts() -> None:
    service = moderation(ScriptedBackend(), request={"mode": "monitor"})
    bad, broken = [await service.judge(Exchange(text), ID) for text in ("BAD", "BROKEN")]
    assert (bad.flagged, bad.action) == (True, "allow")
    assert (broken.flagged, broken.action) == (None, "allow")
    assert (await service.judge(Exchange("Hello.", response="BAD"), ID)).action == "block"
    assert counted(service, "guardreasoner_verdicts_total", outcome="would_block") == 1


async def test_failing_open_is_a_choice_for_one_target_counted_and_critical(caplog: pytest.LogCaptureFixture) -> None:
    service = moderation(ScriptedBackend(), request={"on_error": "allow"})
    with caplog.at_level(logging.CRITICAL):
        through = await service.judge(Exchange("BROKEN"), ID)
    assert (through.flagged, through.action) == (None, "allow")
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == ("CRITICAL", "an exchange was let through unjudged")
    fields = {name: getattr(record, name) for name in ("guard", "code", "target")}
    assert fields == {"guard": "default", "code": through.error and through.error.code, "target": "request"}
    assert "BROKEN" not in caplog.text
    assert counted(service, "guardreasoner_let_through_total", target="request") == 1
    assert (await service.judge(Exchange("Hello.", response="BROKEN"), ID)).action == "block"
    assert (await service.judge(Exchange("BAD"), ID)).action == "block"


async def test_what_its_author_can_cause_never_fails_open() -> None:
    both = {"on_error": "allow"}
    service = moderation(ScriptedBackend(), request=both, response=both)
    image = await service.judge(Exchange("What is it?", ("data:;base64,AAAA",)), ID)
    broken = await service.unjudged(ImageError("no image: send one"), ID)
    slow = moderation(ScriptedBackend(pause=30), request=both, response=both, limits={"seconds": 0.05})
    late = await slow.judge(Exchange("Hello. " * 9), ID)
    codes = [(verdict.error and verdict.error.code, verdict.action) for verdict in (image, broken, late)]
    assert codes == [("invalid_image", "block"), ("invalid_image", "block"), ("deadline", "block")]
    assert counted(service, "guardreasoner_let_through_total") == 0


async def test_an_exchange_not_admitted_fails_open_only_where_both_targets_do() -> None:
    fault = RefusedError("the engine is being started; try again", "engine_down", 2)
    assert (await moderation(ScriptedBackend()).unjudged(fault, ID)).action == "block"
    assert (await moderation(ScriptedBackend(), request={"on_error": "allow"}).unjudged(fault, ID)).action == "block"
    both = {"on_error": "allow"}
    assert (await moderation(ScriptedBackend(), request=both, response=both).unjudged(fault, ID)).action == "allow"


async def test_an_exchange_not_admitted_counts_for_the_side_that_was_named() -> None:
    fault = RefusedError("the engine is being started; try again", "engine_down", 2)
    lenient = moderation(ScriptedBackend(), request={"on_error": "allow"})
    assert (await lenient.unjudged(fault, ID, target="request")).action == "allow"
    assert (await lenient.unjudged(fault, ID, target="response")).action == "block"
    assert counted(lenient, "guardreasoner_let_through_total", target="request") == 1
    assert counted(lenient, "guardreasoner_let_through_total", target="response") == 0


async def test_what_is_no_exchange_counts_for_its_guard_and_takes_no_time() -> None:
    service = several(
        {"request": {"on_error": "allow"}, "response": {"on_error": "allow"}},
        default=ScriptedBackend(),
        fast=ScriptedBackend(name="quick"),
    )
    verdict = await service.unjudged(RefusedError("the engine is being started", "engine_down", 2), ID, "fast")
    assert (verdict.model.name, verdict.action) == ("quick", "allow")
    labels = {"guard": "fast", "target": "response"}
    assert counted(service, "guardreasoner_verdicts_total", outcome="error", **labels) == 1
    assert counted(service, "guardreasoner_let_through_total", **labels) == 1
    assert counted(service, "guardreasoner_verdict_seconds_count", **labels) == 1
    assert counted(service, "guardreasoner_verdict_seconds_sum", **labels) == 0


async def test_a_listener_hears_the_reasoning_about_its_exchange() -> None:
    backend, listener = ScriptedBackend(), Hearing()
    await moderation(backend, cache={"entries": 2}).judge(Exchange("Hello."), ID, listener=listener)
    assert [exchange.prompt for exchange in backend.judged] == ["Hello."]
    assert "Looked at it." in listener.text


async def test_guards_share_no_known_verdicts() -> None:
    backends = {"default": ScriptedBackend(), "fast": ScriptedBackend()}
    service = several({"cache": {"entries": 9}}, **backends)
    for guard in (None, "fast", None, "fast"):
        await service.judge(Exchange("Hello."), ID, guard=guard)
    assert [len(backend.judged) for backend in backends.values()] == [1, 1]


async def test_an_unknown_guard() -> None:
    with pytest.raises(UnknownGuardError, match="use one of default"):
        await moderation(ScriptedBackend()).judge(Exchange("Hello."), ID, guard="other")


async def test_every_verdict_is_written_down(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    service = moderation(ScriptedBackend(), AuditLog(AuditSettings(path=path)))
    for text in ("Hello.", "BAD", "BROKEN"):
        await service.judge(Exchange(text), ID)
    await service.unjudged(ImageError("no image: send one"), ID)
    await service.close()
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [row["action"] for row in rows] == ["allow", "block", "block", "block"]
    assert [row["digest"] for row in rows] == [*(exchange_digest(Exchange(t)) for t in ("Hello.", "BAD", "BROKEN")), ""]
    assert "BAD" not in path.read_text("utf-8")


async def test_the_audit_line_tells_which_verdicts_were_known(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    service = moderation(ScriptedBackend(), AuditLog(AuditSettings(path=path)), cache={"entries": 8})
    for text in ("Hello.", "Hello.", "BROKEN", "BROKEN", "BAD"):
        await service.judge(Exchange(text), ID)
    await service.judge(Exchange("Hello."), ID, listener=QueueListener())
    await service.unjudged(ImageError("no image: send one"), ID)
    await service.close()
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [row["cached"] for row in rows] == [False, True, False, False, False, False, False]


class Hearing:
    """A listener that keeps the text of the answer."""

    cancelled = False
    text = ""

    def on_start(self) -> None:
        self.text = ""

    def on_text(self, text: str) -> None:
        self.text += text


class Writing(ScriptedBackend):
    """Writes 7 tokens about every exchange."""

    async def judge(self, exchange: Exchange, mode: Mode | None, listener: StreamListener | None) -> Verdict:
        verdict = await super().judge(exchange, mode, listener)
        return verdict.model_copy(update={"usage": Usage(completion_tokens=7)})


async def test_a_known_verdict_costs_no_tokens() -> None:
    service = moderation(Writing(), cache={"entries": 8})
    for text in ("one", "one", "two"):
        await service.judge(Exchange(text), ID)
    assert counted(service, "guardreasoner_completion_tokens_total") == 14


def several(settings: dict[str, Any] | None = None, **backends: ScriptedBackend) -> ModerationService:
    metrics = Metrics(tuple(backends))
    service = ModerationService(backends, ServiceConfig(**(settings or {})), metrics, None)
    service.metrics = metrics  # type: ignore[attr-defined]
    return service


async def test_each_verdict_leaves_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    service = moderation(ScriptedBackend(), request={"mode": "monitor"})
    with caplog.at_level(logging.INFO, "guardreasoner_vl"):
        for prompt in ("mild words", "BAD", "BROKEN"):
            await service.judge(Exchange(prompt), Origin("r1"))
        await service.unjudged(ImageError("no image: send one"), Origin("r2"))
    lines = [record for record in caplog.records if record.getMessage() == "verdict"]
    names = ("request_id", "guard", "target", "outcome", "code")
    broken = (await service.judge(Exchange("BROKEN"), ID)).error
    assert broken is not None
    assert [tuple(getattr(line, name) for name in names) for line in lines] == [
        ("r1", "default", "request", "allow", None),
        ("r1", "default", "request", "would_block", None),
        ("r1", "default", "request", "error", broken.code),
        ("r2", "default", "response", "error", "invalid_image"),
    ]
    assert {line.levelno for line in lines} == {logging.INFO}
    assert all(0 <= getattr(line, "seconds") < 60 for line in lines)  # noqa: B009
    logged = [JsonFormatter().format(line) for line in lines]
    assert {*names, "seconds"} <= {*json.loads(logged[0])}
    assert "mild words" not in "".join(logged)


async def test_what_is_in_flight_is_counted_for_its_guard() -> None:
    service = several(default=ScriptedBackend(pause=0.05), fast=ScriptedBackend(pause=0.05))
    in_flight = [
        asyncio.create_task(service.judge(Exchange(text), ID, guard=guard))
        for text, guard in (("one", None), ("two", "fast"), ("three", "fast"))
    ]
    await asyncio.sleep(0.01)
    assert counted(service, "guardreasoner_in_flight", guard="default") == 1
    assert counted(service, "guardreasoner_in_flight", guard="fast") == 2
    await asyncio.gather(*in_flight)
    assert counted(service, "guardreasoner_in_flight") == 0


def test_guards_stand_in_order_of_name_after_the_default_one() -> None:
    service = several(zeal=ScriptedBackend(), default=ScriptedBackend(), early=ScriptedBackend(), a=ScriptedBackend())
    assert service.guards == ["default", "a", "early", "zeal"]
    with pytest.raises(UnknownGuardError, match="use one of default, a, early, zeal"):
        service.backend("other")


def test_a_digest_tells_exchanges_apart() -> None:
    url = "data:image/png;base64,AAAA"
    exchanges = [
        Exchange("a"),
        Exchange("b"),
        Exchange("a", response="a"),
        Exchange(response="a"),
        Exchange("a", (url,)),
        Exchange("a", (b"AAAA",)),
        Exchange("a", history=(Turn("a", (), "b"),)),
        Exchange("a", history=(Turn("a", (), "b"), Turn("a", (), "b"))),
        Exchange(f"a{url}"),
    ]
    assert len({exchange_digest(one) for one in exchanges}) == len(exchanges)
    assert exchange_digest(Exchange("a")) == exchange_digest(Exchange("a"))
