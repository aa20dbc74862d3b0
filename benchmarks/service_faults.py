"""The fault run of `benchmarks.service`: valid, hostile, slow and aborted requests for minutes, then kill -9."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

from benchmarks.serving import is_ready, judged, running
from guardreasoner_vl import Guard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from benchmarks.serving import Server

_COUNTED = (
    *("valid_asked", "valid_answered", "valid_errors", "valid_wrong"),
    *("hostile_asked", "hostile_let_through", "hostile_5xx", "slow_let_in"),
)
PATHS = ("/v1/guard", "/v1/guard/stream", "/v1/moderations", "/beta/litellm_basic_guardrail_api")
BURST = 300
SURE = 0.2
"""Minimum distance of valid requests' scores from 1/2, so that rounding does not flip a label."""


@dataclass
class Faults:
    """Counts of the outcomes of the mixed traffic."""

    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(_COUNTED, 0)))
    memory: list[tuple[int, int]] = field(default_factory=list)


async def mixed(rows: list[dict[str, str]], minutes: float) -> dict[str, Any]:
    with Guard.load("embedded") as guard:
        known = list(guard.moderate_batch(rows))
    sure = [
        (row, verdict.flagged)
        for row, verdict in zip(rows, known, strict=True)
        if verdict.error is None
        and all(
            abs(judgement.score - 0.5) > SURE
            for judgement in (verdict.request, verdict.response)
            if judgement.score is not None
        )
    ]
    faults = Faults()
    async with running(GUARDREASONER_LIMITS__BODY_SECONDS="3") as (server, session):
        until = time.monotonic() + 60 * minutes
        kinds = [_valid] * 6 + [_hostile, _slow, _aborted]
        workers = [_worker(server, session, sure, faults, kinds, until, seed) for seed in range(18)]
        bursts = _bursts(server, session, sure, faults, until)
        with _probe(server, 60 * minutes) as probe:
            await asyncio.gather(_watch(server, faults, until), bursts, *workers)
            readyz = json.loads((await asyncio.to_thread(probe.communicate))[0])
        killed = await _killed(server, session, sure)
    fifth = max(1, len(faults.memory) // 5)
    means = [
        [round(statistics.mean(sizes)) for sizes in zip(*part, strict=True)] for part in _ends(faults.memory, fifth)
    ]
    return {
        "minutes": minutes,
        **faults.counts,
        "readyz_ms": readyz,
        "memory_mb_after_a_fifth_and_last": means,
        "killed": killed,
    }


def _probe(server: Server, seconds: float) -> subprocess.Popen[bytes]:
    """Start a process that probes /readyz, and prints the result at its end."""
    command = [sys.executable, "-m", "benchmarks.readyz_probe", server.url, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


async def _bursts(
    server: Server,
    session: aiohttp.ClientSession,
    sure: list[tuple[dict[str, str], bool | None]],
    faults: Faults,
    until: float,
) -> None:
    """Send many valid requests at once, each minute."""
    while time.monotonic() + 30 < until:
        await asyncio.sleep(20)
        rows = random.Random(len(faults.memory)).choices(sure, k=BURST)
        await asyncio.gather(*(_valid(server, session, row, faults, None) for row in rows))
        faults.counts["bursts"] += 1
        await asyncio.sleep(40)


def _ends(memory: list[tuple[int, int]], fifth: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    return memory[fifth : 2 * fifth], memory[-fifth:]


async def _watch(server: Server, faults: Faults, until: float) -> None:
    while time.monotonic() < until:
        faults.memory.append(server.memory())
        await asyncio.sleep(1)


async def _worker(
    server: Server,
    session: aiohttp.ClientSession,
    sure: list[tuple[dict[str, str], bool | None]],
    faults: Faults,
    kinds: list[Any],
    until: float,
    seed: int,
) -> None:
    rng = random.Random(seed)
    while time.monotonic() < until:
        await rng.choice(kinds)(server, session, rng.choice(sure), faults, rng)


async def _valid(
    server: Server, session: aiohttp.ClientSession, known: tuple[dict[str, str], bool | None], faults: Faults, _: Any
) -> None:
    row, flagged = known
    faults.counts["valid_asked"] += 1
    try:
        verdict = await judged(server, session, row)
    except aiohttp.ClientError as error:
        faults.counts[f"valid_lost_{getattr(error, 'status', type(error).__name__)}"] += 1
        return
    faults.counts["valid_answered"] += 1
    if verdict["error"]:
        faults.counts["valid_errors"] += 1
    elif verdict["flagged"] != flagged:
        faults.counts["valid_wrong"] += 1


async def _hostile(server: Server, session: aiohttp.ClientSession, _: Any, faults: Faults, rng: random.Random) -> None:
    """Send hostile requests: each must be refused, or get an error verdict that blocks."""
    body, path, kind = (
        rng.choice(HOSTILE),
        rng.choice(PATHS),
        rng.choice(("application/json", "application/x-ndjson", "")),
    )
    faults.counts["hostile_asked"] += 1
    with suppress(aiohttp.ClientError):  # the service hangs up on a body that it will not read
        async with session.post(server.url + path, data=body, headers={"content-type": kind}) as answer:
            faults.counts["hostile_let_through"] += answer.status == 200 and _lets_through(await answer.text())
            faults.counts["hostile_5xx"] += answer.status >= 500
    faults.counts["hostile_answered"] += 1


def _hostile_bodies() -> list[bytes]:
    """Bodies without anything to judge, for all routes."""
    image = "data:image/png;base64,"
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image + "\ud800"}}]}]
    shapes: list[Any] = [
        {"prompt": "x", "images": ["file:///etc/passwd"]},
        {"prompt": "x", "images": [image + "A" * 100_000]},
        {"prompt": "x", "images": ["http://169.254.169.254/"]},
        {"prompt": "x", "images": [image + "\ud800"]},
        {"prompt": "x", "images": [None, ["a"]]},
        {"prompt": "\ud800"},
        {"prompt": ["x"] * 1000},
        {"messages": messages},
        {"messages": [{"role": "user", "content": {"a": 1}}, None]},
        {"input": messages[0]["content"]},
        {"input_type": "request", "texts": ["x"], "images": [{"url": ["a"]}]},
        {"input_type": "response", "structured_messages": messages},
        {"prompt": "x", "temperature": float("nan")},
        {"prompt": None, "images": None, "response": None, "messages": None},
    ]
    raw = [b"{", b"[" * 50_000, b'{"a":' * 50_000, b"\xff\x00" * 500, b'{"prompt": 1e999}', b" " * 40_000_000]
    return raw + [json.dumps(shape).encode() for shape in shapes] + [b'{"prompt": "' + b"x" * 33_000_000 + b'"}']


HOSTILE = _hostile_bodies()


def _lets_through(text: str) -> bool:
    """Whether the answer, in any of its shapes, lets the exchange pass."""
    squeezed = text.replace(" ", "")
    return any(mark in squeezed for mark in ('"action":"allow"', '"action":"NONE"', '"flagged":false,"categories"'))


async def _slow(server: Server, session: aiohttp.ClientSession, _: Any, faults: Faults, rng: random.Random) -> None:
    async def dripping() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.1)

    faults.counts["slow_asked"] += 1
    with suppress(aiohttp.ClientError):
        async with session.post(f"{server.url}/v1/guard", data=dripping()) as answer:
            faults.counts["slow_let_in"] += answer.status == 200
    await asyncio.sleep(rng.random())


async def _aborted(
    server: Server, session: aiohttp.ClientSession, known: tuple[dict[str, str], bool | None], faults: Faults, rng: Any
) -> None:
    faults.counts["aborted"] += 1
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(judged(server, session, known[0]), 0.3 * rng.random())


async def _killed(
    server: Server, session: aiohttp.ClientSession, sure: list[tuple[dict[str, str], bool | None]]
) -> dict[str, Any]:
    """kill -9 the engine with 64 exchanges in flight."""
    waiting = [asyncio.create_task(judged(server, session, row)) for row, _ in sure[:64]]
    await asyncio.sleep(0.5)
    os.kill(server.engine_pid(), signal.SIGKILL)
    started = time.perf_counter()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    verdicts = [answer for answer in answers if isinstance(answer, dict)]
    while not await is_ready(server, session):
        await asyncio.sleep(0.1)
    return {
        "under_way": len(waiting),
        "error_verdicts": sum(answer["error"] is not None for answer in verdicts),
        "judged_before": sum(answer["error"] is None for answer in verdicts),
        "refused": len(answers) - len(verdicts),
        "ready_again_s": round(time.perf_counter() - started, 1),
    }
