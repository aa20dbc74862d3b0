"""The engine's process with an engine that counts its calls: a very long text among short ones, and a cancelled one."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.guard import Guard
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.service.process import EngineProcess
from guardreasoner_vl.service.streaming import QueueListener
from guardreasoner_vl.types import Exchange
from tests.builders import answer
from tests.judging.test_judge import BENIGN, PHRASE, CountingEngine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from guardreasoner_vl.engines.base import EngineRequest, EngineResult
    from guardreasoner_vl.types import Verdict

pytestmark = pytest.mark.slow
CONTEXT = 100_000
SIX_MEGABYTES = Exchange(BENIGN * 95_000 + PHRASE)
"""Some eighty windows, the last of them harmful."""

_PAUSE = 0.05


class Numbered(CountingEngine):
    """Writes the number of the call into each answer's reasoning."""

    def __init__(self) -> None:
        super().__init__(self._numbered, limit=CONTEXT)
        self._calls = 0

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        self._calls += 1
        results = super().generate(requests)
        time.sleep(_PAUSE)
        return results

    def _numbered(self, request: EngineRequest) -> str:
        return answer("harmful" if PHRASE in request.messages[1].text else "unharmful", reasoning=f"{self._calls}")


@dataclass(frozen=True)
class ScriptedOpening:
    """Loads that engine in the worker's process."""

    log_level: str = "WARNING"

    def guard(self) -> Guard:
        return Guard(Numbered(), Policy(long_input="windows"))


@pytest.fixture
async def engine() -> AsyncIterator[EngineProcess]:
    process = EngineProcess(ScriptedOpening(), 8)  # type: ignore[arg-type]  # what a worker needs of an opening
    await process.start()
    yield process
    await process.close()


class Begun(QueueListener):
    """Sets an event when the answer starts."""

    def __init__(self) -> None:
        super().__init__()
        self.event = asyncio.Event()

    def on_start(self) -> None:
        self.event.set()


async def begun(engine: EngineProcess) -> asyncio.Task[Verdict]:
    """The task of the very long text, once its first window is in progress."""
    listener = Begun()
    task = asyncio.create_task(engine.judge(SIX_MEGABYTES, None, listener))
    async with asyncio.timeout(30):
        await listener.event.wait()
    return task


def call_of(verdict: Verdict) -> int:
    assert verdict.error is None
    return int(verdict.reasoning or 0)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGINT"])
async def test_a_signal_to_the_whole_group_ends_no_judging(engine: EngineProcess, name: str) -> None:
    """A closed terminal and some supervisors signal every process of a group."""
    assert engine.pid is not None
    os.kill(engine.pid, getattr(signal, name))
    assert (await engine.judge(Exchange("One."))).error is None


async def test_short_exchanges_are_answered_beside_six_megabytes(engine: EngineProcess) -> None:
    long = await begun(engine)
    first = call_of(await engine.judge(Exchange("One.")))
    assert first <= 6
    await asyncio.sleep(5 * _PAUSE)
    second = await asyncio.gather(*(engine.judge(Exchange(f"Number {number}.")) for number in range(5)))
    assert first < min(map(call_of, second)) <= max(map(call_of, second)) < 30
    assert not long.done()
    verdict = await long
    assert verdict.flagged is True
    assert call_of(verdict) > 60


async def test_a_called_off_one_is_asked_about_no_more(engine: EngineProcess) -> None:
    long = await begun(engine)
    long.cancel()
    await asyncio.sleep(10 * _PAUSE)
    assert call_of(await engine.judge(Exchange("One."))) <= 6
    await asyncio.sleep(5 * _PAUSE)
    before = call_of(await engine.judge(Exchange("Two.")))
    assert call_of(await engine.judge(Exchange("Three."))) == before + 1


async def test_who_is_called_off_late_or_twice_is_forgotten(engine: EngineProcess) -> None:
    tasks = [asyncio.create_task(engine.judge(Exchange(f"Number {number}."))) for number in range(20)]
    await asyncio.sleep(_PAUSE / 2)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 10
    assert call_of(await engine.judge(Exchange("And now?"))) < 10
