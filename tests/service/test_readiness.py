"""Readiness probes are answered at once and correctly, whatever the guard is doing."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import EngineError, InputError
from guardreasoner_vl.judging.judge import error_verdict
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.service.backend import EngineLoad
from guardreasoner_vl.service.callers import Origin
from guardreasoner_vl.service.config import Limits, ServiceConfig
from guardreasoner_vl.service.metrics import Metrics
from guardreasoner_vl.service.moderation import ModerationService
from guardreasoner_vl.service.readiness import Readiness
from guardreasoner_vl.types import Exchange
from tests.service.clients import app_of, client
from tests.service.scripted_backend import ScriptedBackend
from tests.service.verdicts import MODEL, verdict

if TYPE_CHECKING:
    import httpx
    import pytest

    from guardreasoner_vl.types import Verdict

GOOD = verdict(harmful=False)
FAULT = error_verdict(EngineError("the engine is out of order; try again"), Policy(), MODEL)
REFUSED = error_verdict(InputError("nothing to judge: send a prompt"), Policy(), MODEL)


class Guard:
    """A guard for `Readiness`: returns `answer` after `pause` seconds and counts its calls."""

    def __init__(self, answer: Verdict = GOOD, pause: float = 0.0) -> None:
        self.answer, self.pause, self.asked = answer, pause, 0

    async def __call__(self) -> Verdict:
        self.asked += 1
        await asyncio.sleep(self.pause)
        return self.answer


async def settled() -> None:
    await asyncio.sleep(0.02)


async def test_a_guard_is_ready_from_its_first_verdict_on() -> None:
    guard = Guard()
    readiness = Readiness(guard, fresh=60)
    assert not readiness.is_ready(up=True, idle=True)
    await settled()
    assert [readiness.is_ready(up=True, idle=True) for _ in range(3)] == [True] * 3
    assert guard.asked == 1


async def test_a_guard_that_fails_at_our_own_exchange_is_not_ready_until_it_judges() -> None:
    guard = Guard(REFUSED)
    readiness = Readiness(guard, fresh=60)
    readiness.start_probe()
    await settled()
    assert not readiness.is_ready(up=True, idle=False)
    readiness.observe(GOOD)
    assert readiness.is_ready(up=True, idle=False)


async def test_a_busy_guard_is_never_asked_and_is_ready_while_verdicts_come() -> None:
    guard = Guard()
    readiness = Readiness(guard, fresh=0.0)
    readiness.observe(GOOD)
    await settled()
    assert readiness.is_ready(up=True, idle=False)
    readiness.observe(FAULT)
    await settled()
    assert not readiness.is_ready(up=True, idle=False)
    readiness.observe(GOOD)
    assert readiness.is_ready(up=True, idle=False)
    readiness.observe(REFUSED)  # the exchange's own fault
    await settled()
    assert readiness.is_ready(up=True, idle=False)
    assert guard.asked == 0


async def test_a_fault_of_an_idle_guard_is_looked_into_before_it_counts() -> None:
    guard = Guard()
    readiness = Readiness(guard, fresh=0.05)
    readiness.observe(GOOD)
    readiness.observe(FAULT)
    assert readiness.is_ready(up=True, idle=True)
    await settled()
    assert (guard.asked, readiness.is_ready(up=True, idle=True)) == (1, True)
    guard.answer = FAULT
    readiness.observe(FAULT)
    assert readiness.is_ready(up=True, idle=True)
    await settled()
    assert (guard.asked, readiness.is_ready(up=True, idle=True)) == (2, False)
    await readiness.close()


async def test_a_guard_that_hangs_is_asked_once_and_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guardreasoner_vl.service.readiness.PROBE_SECONDS", 0.05)
    guard = Guard(pause=30)
    readiness = Readiness(guard, fresh=0.0)
    readiness.observe(GOOD)
    await asyncio.sleep(0.001)
    assert all(readiness.is_ready(up=True, idle=True) for _ in range(5))
    await asyncio.sleep(0.1)
    assert not readiness.is_ready(up=True, idle=False)
    assert guard.asked == 1


async def test_an_engine_that_was_down_has_to_judge_anew() -> None:
    readiness = Readiness(Guard(), fresh=60)
    readiness.observe(GOOD)
    assert not readiness.is_ready(up=False, idle=True)
    assert not readiness.is_ready(up=True, idle=True)
    await settled()
    assert readiness.is_ready(up=True, idle=True)


# --- in the service -----------------------------------------------------------------------------------


def moderation(backend: ScriptedBackend, **limits: Any) -> ModerationService:
    return ModerationService({"default": backend}, ServiceConfig(limits=Limits(**limits)), Metrics(), None)


async def test_a_probe_never_waits_behind_exchanges() -> None:
    """Verdicts take longer than they stay fresh, and the probe would be last in the queue."""
    service = moderation(ScriptedBackend(pause=0.2), ready_seconds=0.01)
    await service.judge(Exchange("Hello."), Origin("0"))
    in_flight = [asyncio.create_task(service.judge(Exchange(f"Loaf {number}?"), Origin("0"))) for number in range(20)]
    await asyncio.sleep(0.05)
    started = time.perf_counter()
    assert service.state() == "ready"
    assert time.perf_counter() - started < 0.05
    await asyncio.gather(*in_flight)
    await service.close()


async def test_a_full_queue_is_not_ready() -> None:
    service = moderation(ScriptedBackend(pause=0.1), queue=2)
    await service.judge(Exchange("Hello."), Origin("0"))
    in_flight = [asyncio.create_task(service.judge(Exchange(f"Loaf {number}?"), Origin("0"))) for number in range(2)]
    await asyncio.sleep(0.01)
    assert service.state() == "queue full"
    await asyncio.gather(*in_flight)
    assert service.state() == "ready"


async def scraped(http: httpx.AsyncClient) -> str:
    lines = (await http.get("/metrics")).text.splitlines()
    (line,) = [line for line in lines if line.startswith("guardreasoner_engine_up{")]
    return line.split()[1]


async def test_a_scrape_tells_the_load_of_the_engines() -> None:
    backend = ScriptedBackend()
    backend.load = EngineLoad(3, 4_000)
    async with client(app_of(backend)) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    assert 'guardreasoner_engine_queue_length{guard="default"} 3.0' in lines
    assert 'guardreasoner_engine_resident_bytes{guard="default"} 4000.0' in lines


async def test_a_scrape_alone_tells_whether_the_guards_are_ready() -> None:
    backend = ScriptedBackend()
    async with client(app_of(backend)) as http, asyncio.timeout(30):
        for _ in range(2):
            while await scraped(http) != "1.0":
                await settled()
            backend.is_up = False
            assert await scraped(http) == "0.0"
            backend.is_up = True
            assert await scraped(http) == "0.0"  # until it has judged again


async def test_a_scrape_does_not_wait_for_a_guard_that_hangs() -> None:
    async with client(app_of(ScriptedBackend(pause=60))) as http, asyncio.timeout(30):
        assert await scraped(http) == "0.0"
