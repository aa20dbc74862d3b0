"""The service under load, against `moderate_batch` on the same inputs, and under faults.

    python -m benchmarks.service                     throughput at saturation, latencies at half and at 80% of it
    python -m benchmarks.service --batch             `batch --url` against callers that saturate the service
    python -m benchmarks.service --faults 10         minutes of mixed traffic: valid, hostile, slow, aborted; kill -9

The embedded guard in slow mode, made-up exchanges of 5 to 120 words, unsorted; service, engine and load generator on
one machine. Saturation: `--clients` callers, each asking as soon as it was answered; the ratio is of medians of
interleaved repeats. Latencies: arrivals at random moments (Poisson), whatever is still under way. With `--beside` the
service of another checkout is measured in turns with ours, at the same arrivals. Faults: every valid request has a
verdict known before; what differs, gets lost or comes twice is counted, and the processes' memory is read each second.
Meanwhile /readyz is asked 20 times a second by a process of its own, and each minute 300 requests come at
once: `readyz_ms` are the milliseconds of its answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.service_faults import mixed
from benchmarks.serving import judged, running
from guardreasoner_vl import Guard
from guardreasoner_vl.batch.moderate import run_batch
from guardreasoner_vl.remote.served import ServedGuard
from guardreasoner_vl.sources.synthetic.phrases import phrase

if TYPE_CHECKING:
    from collections.abc import Sequence

    import aiohttp

    from benchmarks.serving import Server


def exchanges(count: int) -> list[dict[str, str]]:
    """Made-up exchanges; half of them have a response."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        parts: list[str] = []
        while len(" ".join(parts).split()) < rng.randint(5, 120):
            parts.append(phrase(rng, rng.choice(("harmful", "unharmful"))))
        row = {"prompt": f"{number}: " + ". ".join(parts)}
        if number % 2:
            row["response"] = phrase(rng, rng.choice(("harmful", "unharmful")))
        rows.append(row)
    return rows


async def saturated(
    server: Server, session: aiohttp.ClientSession, rows: Sequence[dict[str, str]], clients: int
) -> float:
    """Throughput in exchanges per second."""
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
    """Quantiles of the seconds from arrival to verdict at `rate` arrivals per second."""
    rng, seconds = random.Random(1), list[float]()

    async def judge_row(row: dict[str, str]) -> None:
        started = time.perf_counter()
        await judged(server, session, row)
        seconds.append(time.perf_counter() - started)

    tasks = []
    for row in rows:
        await asyncio.sleep(rng.expovariate(rate))
        tasks.append(asyncio.create_task(judge_row(row)))
    await asyncio.gather(*tasks)
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": round(cuts[49], 2), "p95": round(cuts[94], 2), "p99": round(cuts[98], 2)}


async def files(rows: list[dict[str, str]], repeats: int, clients: int) -> dict[str, Any]:
    """A file judged by `batch --url` with as many requests in flight as there are callers, each at a new service."""
    callers, batch = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        source.write_text("".join(json.dumps({"id": number, **row}) + "\n" for number, row in enumerate(rows)))

        def judge(server: Server) -> float:
            target.unlink(missing_ok=True)
            with ServedGuard(server.url, "slow", max_concurrency=clients) as guard:  # as many rows again wait
                summary = run_batch(guard, source, target, chunk=2 * clients)
            assert summary.complete
            return summary.per_second

        for _ in range(repeats):
            async with running() as (server, session):
                callers.append(await saturated(server, session, rows, clients))
            async with running() as (server, _):
                batch.append(await asyncio.to_thread(judge, server))
    ratio = statistics.median(batch) / statistics.median(callers)
    rates = {"callers_per_s": round(statistics.median(callers), 2), "batch_per_s": round(statistics.median(batch), 2)}
    return {"exchanges": len(rows), "clients": clients, **rates, "ratio": round(ratio, 3)}


async def load(rows: list[dict[str, str]], repeats: int, clients: int, beside: str | None) -> dict[str, Any]:
    batch: list[float] = []
    codes = {"service": {}, **({"beside": {"PYTHONPATH": beside}} if beside else {})}
    rates: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(repeats):
        started = time.perf_counter()
        with Guard.load("embedded") as guard:
            assert next(guard.moderate_batch([rows[0]])).error is None
            started = time.perf_counter()
            verdicts = list(guard.moderate_batch(rows))
        batch.append(len(verdicts) / (time.perf_counter() - started))
        for name, environment in codes.items():
            async with running(**environment) as (server, session):
                rates[name].append(await saturated(server, session, rows, clients))
    rate = statistics.median(rates["service"])
    results: dict[str, Any] = {"exchanges": len(rows), "clients": clients}
    results["moderate_batch_per_s"] = round(statistics.median(batch), 2)
    for name, environment in codes.items():
        async with running(**environment) as (server, session):
            waits = {f"{share:.0%}": await latencies(server, session, rows, rate * share) for share in (0.5, 0.8)}
        median = statistics.median(rates[name])
        ratio = round(median / statistics.median(batch), 3)
        results[name] = {"per_s": round(median, 2), "ratio": ratio, "latency_s": waits}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exchanges", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--faults", type=float, metavar="MINUTES")
    parser.add_argument("--batch", action="store_true")
    parser.add_argument("--beside", metavar="SRC", help="src of another checkout, measured beside ours")
    arguments = parser.parse_args()
    rows = exchanges(arguments.exchanges)
    if arguments.faults:
        work = mixed(rows, arguments.faults)
    elif arguments.batch:
        work = files(rows, arguments.repeats, arguments.clients)
    else:
        work = load(rows, arguments.repeats, arguments.clients, arguments.beside)
    print(json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} cores", **asyncio.run(work)}))


if __name__ == "__main__":
    main()
