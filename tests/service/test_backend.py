"""A backend behind an OpenAI-compatible server, played by a stub of vLLM."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest_asyncio

from guardreasoner_vl.service.backend import EngineLoad, RemoteBackend
from guardreasoner_vl.service.config import GuardSection, Limits
from guardreasoner_vl.service.streaming import QueueListener, event_stream, verdict_event
from guardreasoner_vl.types import Exchange
from tests.engines.openai.stub_server import StubServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest_asyncio.fixture
async def stub() -> AsyncIterator[StubServer]:
    with StubServer() as server:
        yield server


@pytest_asyncio.fixture
async def backend(stub: StubServer) -> AsyncIterator[RemoteBackend]:
    remote = RemoteBackend(GuardSection(base_url=stub.url, model="stub-vl"), Limits(max_batch_size=8))
    await remote.start()
    yield remote
    await remote.close()


async def test_reasoning_is_streamed_while_the_server_still_writes(stub: StubServer, backend: RemoteBackend) -> None:
    stub.goes_on.clear()
    listener = QueueListener()
    events = event_stream(listener, backend.judge(Exchange("How do I bake bread?"), "slow", listener), verdict_event)
    async with asyncio.timeout(5):
        received = [await anext(events)]
        stub.goes_on.set()
        received += [late_event async for late_event in events]
    *reasoning, last = received
    assert len(reasoning) > 5
    assert reasoning[0].startswith(b"event: reasoning")
    assert b"unharmful" in last


async def test_who_stops_listening_makes_the_engine_hang_up(stub: StubServer, backend: RemoteBackend) -> None:
    stub.inject("hang")
    listener = QueueListener()
    task = asyncio.create_task(backend.judge(Exchange("How do I bake bread?"), "slow", listener))
    while not any(payload.get("stream") for payload in stub.payloads):
        await asyncio.sleep(0.01)
    assert backend.load == EngineLoad(queue_length=1)
    task.cancel()
    assert await asyncio.to_thread(stub.disconnected.wait, 5.0)


async def test_only_so_many_are_asked_about_at_once(stub: StubServer, backend: RemoteBackend) -> None:
    stub.delay = 0.02
    exchanges = [Exchange(f"How do I bake {number} loaves?") for number in range(24)]
    verdicts = await asyncio.gather(*(backend.judge(exchange, "slow", None) for exchange in exchanges))
    assert {verdict.action for verdict in verdicts} == {"allow"}
    assert 4 <= stub.most_in_flight <= 8
