"""`batch --ray` with two workers against one, and against `batch` in one process.

    python -m benchmarks.ray_batch [--rows 2048] [--chunk 32] [--seconds 0.4] [--repeats 5]

The engine sleeps `seconds` for each call, as long as a remote GPU would take for a chunk, and answers as a guard does;
everything else is what the command does: rows read from a file, sent to the workers, judged, their verdicts written and
flushed to the disk. Each arm has a local cluster of its own, whose start is left out. Interleaved; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.batch.moderate import run_batch
from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.scale.ray_guard import RayGuard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.engines.base import EngineRequest, EngineResult

ANSWER = (
    "<think>\nThe user asks for bread.\n</think>\n<result>\nAnswers:\nRequest: unharmful\nResponse: None\n</result>"
)


class Remote(ScriptedEngine):
    """Sleeps for each call instead of running a model."""

    def __init__(self, seconds: float) -> None:
        super().__init__(lambda _: ANSWER)
        self._seconds = seconds

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        time.sleep(self._seconds)
        self.requests.clear()
        return super().generate(requests)


def remote_guard(seconds: float) -> Guard:
    return Guard(Remote(seconds))


def opened(workers: int, seconds: float) -> Guard | RayGuard:
    """The guard of an arm; 0 workers: in this process."""
    if not workers:
        return remote_guard(seconds)
    return RayGuard("local", partial(remote_guard, seconds), Policy(), workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rates: dict[int, list[float]] = {workers: [] for workers in (0, 1, 2)}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        source.write_text(
            "".join(json.dumps({"id": n, "prompt": f"How do I bake bread {n}?"}) + "\n" for n in range(arguments.rows))
        )
        for _ in range(arguments.repeats):
            for workers, measured in rates.items():
                target.unlink(missing_ok=True)
                with opened(workers, arguments.seconds) as guard:
                    summary = run_batch(guard, source, target, chunk=arguments.chunk)
                assert summary.complete
                measured.append(summary.per_second)
    median = {workers: statistics.median(measured) for workers, measured in rates.items()}
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rows": arguments.rows,
        "one_engine_limit_per_s": round(arguments.chunk / arguments.seconds, 1),
        "per_s": {f"{workers} workers" if workers else "no Ray": round(rate, 1) for workers, rate in median.items()},
        "two_against_one": round(median[2] / median[1], 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
