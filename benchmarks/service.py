"""The service under load, beside `moderate_batch` on the same inputs, and under faults.

    python -m benchmarks.service                     throughput at saturation, latencies at half and at 80% of it
    python -m benchmarks.service --faults 10         minutes of mixed traffic: valid, hostile, slow, aborted; kill -9

The embedded guard in slow mode, made-up exchanges of 5 to 120 words, unsorted; service, engine and load generator on
one machine. Saturation: `--clients` callers, each asking as soon as it was answered; the ratio is of medians of
interleaved repeats. Latencies: arrivals at random moments (Poisson), whatever is still under way. Faults: every valid
request has a verdict known before; what differs, gets lost or comes twice is counted, and the processes' memory is read
each second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from guardreasoner_vl import Guard
from guardreasoner_vl.sources.phrases import phrase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

_COUNTED = ("valid_asked", "valid_answered", "valid_errors", "valid_wrong", "hostile_let_through", "slow_let_in")
SURE = 0.2
"""Valid requests of the fault run have scores at least this far from one half, so that rounding turns none over."""


def exchanges(count: int) -> list[dict[str, str]]:
    """Made-up exchanges; half of them answered."""
    rng = random.Random(0)
    made = []
    for number in range(count):
        told: list[str] = []
        while len(" ".join(told).split()) < rng.randint(5, 120):
            told.append(phrase(rng, rng.choice(("harmful", "unharmful"))))
        row = {"prompt": f"{number}: " + ". ".join(told)}
        if number % 2:
            row["response"] = phrase(rng, rng.choice(("harmful", "unharmful")))
        made.append(row)
    return made


@dataclass
class Server:
    """The command in a process of its own."""

    url: str
    process: subprocess.Popen[bytes]

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text("ascii")
        return max(map(int, children.split()))

    def memory(self) -> tuple[int, int]:
        """Resident MB of the service and of its engine; 0 for one that is being replaced."""
        return _resident(self.process.pid), _resident(self.engine_pid())


def _resident(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) // 1024
    return 0


@asynccontextmanager
async def running(**environment: str) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from guardreasoner_vl.cli import main; main()", "serve", "--port", str(port)]
    settings = {
        **os.environ,
        "GUARDREASONER_LOG_LEVEL": "CRITICAL",
        "GUARDREASONER_LIMITS__QUEUE": "512",
        **environment,
    }
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=settings)
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            while not await _is_ready(server, session):
                await asyncio.sleep(0.2)
            yield server, session
    finally:
        process.terminate()
        process.wait()


async def _is_ready(server: Server, session: aiohttp.ClientSession) -> bool:
    with suppress(aiohttp.ClientError):
        async with session.get(f"{server.url}/readyz") as answer:
            return answer.status == 200
    return False


async def judged(server: Server, session: aiohttp.ClientSession, row: dict[str, str]) -> dict[str, Any]:
    async with session.post(f"{server.url}/v1/guard", json=row) as answer:
        answer.raise_for_status()
        found: dict[str, Any] = await answer.json()
        return found


async def saturated(
    server: Server, session: aiohttp.ClientSession, rows: Sequence[dict[str, str]], clients: int
) -> float:
    """Exchanges a second."""
    waiting = list(reversed(rows))

    async def client() -> None:
        while waiting:
            await judged(server, session, waiting.pop())

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return len(rows) / (time.perf_counter() - started)


async def latencies(
    server: Server, session: aiohttp.ClientSession, rows: Sequence[dict[str, str]], rate: float
) -> dict[str, float]:
    """Seconds from arrival to verdict at that many arrivals a second."""
    rng, found = random.Random(1), list[float]()

    async def one(row: dict[str, str]) -> None:
        started = time.perf_counter()
        await judged(server, session, row)
        found.append(time.perf_counter() - started)

    tasks = []
    for row in rows:
        await asyncio.sleep(rng.expovariate(rate))
        tasks.append(asyncio.create_task(one(row)))
    await asyncio.gather(*tasks)
    cuts = statistics.quantiles(found, n=100)
    return {"p50": round(cuts[49], 2), "p95": round(cuts[94], 2), "p99": round(cuts[98], 2)}


async def load(rows: list[dict[str, str]], repeats: int, clients: int) -> dict[str, Any]:
    batch: list[float] = []
    service: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        with Guard.load("embedded") as guard:
            assert next(guard.moderate_batch([rows[0]])).error is None
            started = time.perf_counter()
            verdicts = list(guard.moderate_batch(rows))
        batch.append(len(verdicts) / (time.perf_counter() - started))
        async with running() as (server, session):
            service.append(await saturated(server, session, rows, clients))
    rate = statistics.median(service)
    async with running() as (server, session):
        found = {f"{share:.0%}": await latencies(server, session, rows, rate * share) for share in (0.5, 0.8)}
    return {
        "exchanges": len(rows),
        "clients": clients,
        "moderate_batch_per_s": round(statistics.median(batch), 2),
        "service_per_s": round(rate, 2),
        "ratio": round(rate / statistics.median(batch), 3),
        "latency_s": found,
    }


@dataclass
class Faults:
    """What became of the mixed traffic."""

    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(_COUNTED, 0)))
    memory: list[tuple[int, int]] = field(default_factory=list)


async def mixed(rows: list[dict[str, str]], minutes: float) -> dict[str, Any]:
    with Guard.load("embedded") as guard:
        known = list(guard.moderate_batch(rows))
    sure = [
        (row, verdict.flagged)
        for row, verdict in zip(rows, known, strict=True)
        if verdict.error is None
        and all(abs(one.score - 0.5) > SURE for one in (verdict.request, verdict.response) if one.score is not None)
    ]
    faults = Faults()
    async with running(GUARDREASONER_LIMITS__BODY_SECONDS="3") as (server, session):
        until = time.monotonic() + 60 * minutes
        kinds = [_valid] * 6 + [_hostile, _slow, _aborted]
        workers = [_worker(server, session, sure, faults, kinds, until, seed) for seed in range(18)]
        await asyncio.gather(_watch(server, faults, until), *workers)
        killed = await _killed(server, session, sure)
    fifth = max(1, len(faults.memory) // 5)
    means = [[round(statistics.mean(one)) for one in zip(*part, strict=True)] for part in _ends(faults.memory, fifth)]
    return {"minutes": minutes, **faults.counts, "memory_mb_after_a_fifth_and_last": means, "killed": killed}


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
    """Each is refused, or an error verdict that blocks."""
    body: Any = rng.choice(
        [
            b"{",
            b"[" * 50_000,
            b"\xff\x00" * 500,
            json.dumps({"prompt": "x", "images": ["file:///etc/passwd"]}).encode(),
            json.dumps({"prompt": "x", "images": ["data:image/png;base64," + "A" * 100_000]}).encode(),
            json.dumps({"prompt": "x", "images": ["http://169.254.169.254/"]}).encode(),
            json.dumps({"prompt": "\ud800"}).encode(),
            b" " * 40_000_000,
        ]
    )
    faults.counts["hostile_asked"] += 1
    with suppress(aiohttp.ClientError):  # the service hangs up on a body that it will not read
        async with session.post(
            f"{server.url}/v1/guard", data=body, headers={"content-type": "application/json"}
        ) as answer:
            if answer.status == 200 and (await answer.json())["action"] != "block":
                faults.counts["hostile_let_through"] += 1
    faults.counts["hostile_answered"] += 1


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
    """kill -9 of the engine with 64 exchanges under way."""
    waiting = [asyncio.create_task(judged(server, session, row)) for row, _ in sure[:64]]
    await asyncio.sleep(0.5)
    os.kill(server.engine_pid(), signal.SIGKILL)
    started = time.perf_counter()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    verdicts = [one for one in answers if isinstance(one, dict)]
    while not await _is_ready(server, session):
        await asyncio.sleep(0.1)
    return {
        "under_way": len(waiting),
        "error_verdicts": sum(one["error"] is not None for one in verdicts),
        "judged_before": sum(one["error"] is None for one in verdicts),
        "refused": len(answers) - len(verdicts),
        "ready_again_s": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exchanges", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--faults", type=float, metavar="MINUTES")
    arguments = parser.parse_args()
    rows = exchanges(arguments.exchanges)
    work = mixed(rows, arguments.faults) if arguments.faults else load(rows, arguments.repeats, arguments.clients)
    print(json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} cores", **asyncio.run(work)}))


if __name__ == "__main__":
    main()
