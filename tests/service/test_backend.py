"""A guard behind an OpenAI-compatible server, which a stub of vLLM plays."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest_asyncio

from guardreasoner_vl.service.backend import OtherServer
from guardreasoner_vl.service.config import GuardSection
from guardreasoner_vl.service.streaming import QueueWatch, told, verdict_event
from guardreasoner_vl.types import Exchange
from tests.engines.openai.stub_server import StubServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest_asyncio.fixture
async def stub() -> AsyncIterator[StubServer]:
    with StubServer() as server:
        yield server


@pytest_asyncio.fixture
async def backend(stub: StubServer) -> AsyncIterator[OtherServer]:
    made = OtherServer(GuardSection(base_url=stub.url, model="stub-vl"), 8)
    await made.start()
    yield made
    await made.close()


async def test_reasoning_is_told_while_the_server_still_writes(stub: StubServer, backend: OtherServer) -> None:
    stub.goes_on.clear()
    watch = QueueWatch()
    events = told(watch, backend.judge(Exchange("How do I bake bread?"), "slow", watch), verdict_event)
    async with asyncio.timeout(5):
        found = [await anext(events)]
        stub.goes_on.set()
        found += [one async for one in events]
    *reasoning, last = found
    assert len(reasoning) > 5
    assert reasoning[0].startswith(b"event: reasoning")
    assert b"unharmful" in last


async def test_who_stops_listening_makes_the_engine_hang_up(stub: StubServer, backend: OtherServer) -> None:
    stub.inject("hang")
    watch = QueueWatch()
    task = asyncio.create_task(backend.judge(Exchange("How do I bake bread?"), "slow", watch))
    while not any(payload.get("stream") for payload in stub.payloads):
        await asyncio.sleep(0.01)
    task.cancel()
    assert await asyncio.to_thread(stub.disconnected.wait, 5.0)


async def test_only_so_many_are_asked_about_at_once(stub: StubServer, backend: OtherServer) -> None:
    stub.delay = 0.02
    exchanges = [Exchange(f"How do I bake {number} loaves?") for number in range(24)]
    verdicts = await asyncio.gather(*(backend.judge(exchange, "slow", None) for exchange in exchanges))
    assert {verdict.action for verdict in verdicts} == {"allow"}
    assert 4 <= stub.most_in_flight <= 8
