"""The real engine process: concurrent exchanges, streamed answers, a kill in the middle, and the restart."""

from __future__ import annotations

import asyncio
import errno
import logging
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from guardreasoner_vl.errors import EngineError, ModelError
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.service import process
from guardreasoner_vl.service.backend import LocalBackend
from guardreasoner_vl.service.config import GuardSection, Limits
from guardreasoner_vl.service.process import EngineGoneError, EngineProcess
from guardreasoner_vl.service.streaming import QueueListener
from guardreasoner_vl.service.worker import ModelLoaded, WorkerConfig
from guardreasoner_vl.types import Exchange, ModelInfo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
OPTIONS = {"engine": "transformers", "dtype": "fp32"}
POLICY = Policy(mode="fast", max_new_tokens=24, retry_new_tokens=24)
LONG = Policy(mode="slow", max_new_tokens=1500, retry_new_tokens=1500)


class Restarts:
    count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny_model: Path) -> AsyncIterator[EngineProcess]:
    engine_process = EngineProcess(WorkerConfig(str(tiny_model), None, POLICY, OPTIONS), 8)
    await engine_process.start()
    yield engine_process
    await engine_process.close()


async def test_concurrent_exchanges_get_their_own_verdicts(engine: EngineProcess, tiny_model: Path) -> None:
    exchanges = [Exchange(f"How do I bake {number} loaves?" + " please" * number) for number in range(20)]
    results = await asyncio.gather(*(engine.judge(exchange) for exchange in exchanges))
    with Guard.load(str(tiny_model), policy=POLICY, dtype="fp32") as guard:
        for exchange, verdict in zip(exchanges, results, strict=True):
            alone = guard.moderate(exchange.prompt)
            assert verdict.request.label == alone.request.label
            assert verdict.request.score == pytest.approx(alone.request.score, abs=1e-4)
    assert len({verdict.request.score for verdict in results}) > 10


async def test_the_openvino_engine_in_its_process(tiny_model: Path) -> None:
    section = GuardSection(model=str(tiny_model), engine="openvino", mode="fast", max_new_tokens=24)
    backend = LocalBackend(section, Limits(max_batch_size=8), Restarts())
    await backend.start()
    try:
        verdict = await backend.judge(Exchange("How do I bake a loaf?"), None, None)
    finally:
        await backend.close()
    with Guard.load(str(tiny_model), "openvino", policy=section.policy) as guard:
        assert verdict.request == guard.moderate("How do I bake a loaf?").request


async def test_what_cannot_be_judged_is_an_error_verdict(engine: EngineProcess) -> None:
    verdict = await engine.judge(Exchange("What is this?", ("data:image/png;base64,AAAA",)))
    assert verdict.error is not None
    assert verdict.error.code == "invalid_image"


async def test_a_watched_answer_is_streamed(engine: EngineProcess) -> None:
    class Pieces(QueueListener):
        def on_text(self, text: str) -> None:
            pieces.append(text)

    pieces: list[str] = []
    verdict = await engine.judge(Exchange("Tell me about bread."), "slow", Pieces())
    assert verdict.usage.completion_tokens == 24
    assert len(pieces) > 10


async def test_who_no_longer_waits_is_forgotten(engine: EngineProcess) -> None:
    task = asyncio.create_task(engine.judge(Exchange("Tell me about bread."), "slow"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await engine.judge(Exchange("And about butter?"))).error is None


async def test_a_killed_process_answers_with_errors_and_restarts(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "FIRST_PAUSE", 0.01)
    restarts = Restarts()
    engine = EngineProcess(WorkerConfig(str(tiny_model), None, LONG, OPTIONS), 8, restarts)
    await engine.start()
    try:
        first = engine.pid
        assert first is not None
        begun = asyncio.Event()

        class Begun(QueueListener):
            def on_start(self) -> None:
                begun.set()

        waiting = [asyncio.create_task(engine.judge(Exchange(f"Loaf {number}?"), None, Begun())) for number in range(3)]
        await begun.wait()
        os.kill(first, signal.SIGKILL)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(one, EngineGoneError) for one in results)
        with pytest.raises(EngineGoneError):
            await engine.judge(Exchange("Too early?"))
        while engine.ready is None:
            await asyncio.sleep(0.05)
        assert engine.pid not in (None, first)
        assert restarts.count == 1
        assert (await engine.judge(Exchange("And now?"), "fast")).error is None
    finally:
        await engine.close()
    assert engine.ready is None


async def test_a_model_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    engine = EngineProcess(WorkerConfig(str(tmp_path), None, POLICY, OPTIONS), 8)
    with pytest.raises(ModelError, match=r"config\.json"):
        await engine.start()
    await engine.close()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
        (RuntimeError("can't start new thread"), "RuntimeError"),
        (ModelError("no model"), "model"),
    ],
)
async def test_a_restart_that_fails_for_any_reason_is_tried_again(
    fault: Exception, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "FIRST_PAUSE", 0.01)
    handles: list[Handle] = []
    faults = [fault, fault]

    class Handle:
        pid = 1

        def __init__(self, *_: Any) -> None:
            if handles and faults:
                raise faults.pop()
            handles.append(self)
            self.first_message = asyncio.get_running_loop().create_future()
            self.first_message.set_result(ModelLoaded(ModelInfo(name="m"), {}))
            self.ended = asyncio.Event()

        def end(self) -> None:
            pass

    monkeypatch.setattr(process, "_WorkerHandle", Handle)
    engine = EngineProcess(WorkerConfig("m", None, POLICY, OPTIONS), 8)
    await engine.start()
    with caplog.at_level(logging.CRITICAL):
        handles[0].ended.set()
        async with asyncio.timeout(10):
            while len(handles) < 2 or engine.ready is None:
                await asyncio.sleep(0.01)
    await engine.close()
    failed = f"the engine's process failed to start ({reason})"
    assert [record.getMessage() for record in caplog.records][1:] == [failed, failed]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
    ],
)
async def test_a_first_start_that_fails_is_one_line(
    fault: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process(*_: Any) -> None:
        raise fault

    monkeypatch.setattr(process, "_WorkerHandle", no_process)
    with pytest.raises(EngineError) as caught:
        await EngineProcess(WorkerConfig("m", None, POLICY, OPTIONS), 8).start()
    assert str(caught.value) == (
        f"the engine's process cannot be started ({reason}): free memory, or allow more processes and files"
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
async def test_the_queue_and_the_memory_of_the_process(engine: EngineProcess) -> None:
    assert engine.queue_length == 0
    tasks = [asyncio.create_task(engine.judge(Exchange(f"Loaf {number}?"))) for number in range(3)]
    await asyncio.sleep(0)
    assert engine.queue_length == 3
    assert engine.resident_bytes is not None
    assert 50_000_000 < engine.resident_bytes < 64_000_000_000
    await asyncio.gather(*tasks)
    assert engine.queue_length == 0
    assert EngineProcess(WorkerConfig("m", None, POLICY, OPTIONS), 8).resident_bytes is None


async def test_a_process_that_gets_no_threads_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    class Spawned:
        def __init__(self, **_: Any) -> None:
            pass

        def start(self) -> None:
            steps.append("start")

        def kill(self) -> None:
            steps.append("kill")

    def no_more(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(
        multiprocessing, "get_context", lambda _: SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Spawned)
    )
    monkeypatch.setattr(threading.Thread, "start", no_more)
    engine = EngineProcess(WorkerConfig("m", None, POLICY, OPTIONS), 8)
    with pytest.raises(EngineError, match="cannot be started"):
        await engine.start()
    assert steps == ["start", "kill"]
