"""The engines for a CPU side by side: verdicts per second, cold start, and whether the verdicts stay the same.

    python -m benchmarks.cpu_engines [--model embedded] [--data DIR] [--rows 2000] [--slow-rows 200] [--repeats 3]

Same model, exchanges and policy for every arm: transformers in the precision that it chooses and in fp32, OpenVINO in
the precision that it chooses and with hidden states in fp32. Medians of interleaved repeats. With --data, held-out rows
of the public sets there are judged by every arm, and labels are compared with those of transformers in fp32.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.quality.sets import public_sets
from benchmarks.speed import agreement, cold, exchanges, timed
from guardreasoner_vl.cli.terminal import be_quiet
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.types import Exchange, Label, Mode

if TYPE_CHECKING:
    from collections.abc import Sequence

REFERENCE = "transformers, fp32"
SPEED_MODES: tuple[Mode, ...] = ("fast", "slow")
POLICY = Policy(ocr="never")
"""Printed words are not read: that takes the same time whatever the engine."""
SINGLE = 12
"""Exchanges that are judged one at a time."""


def arms(model: str) -> dict[str, Guard]:
    """The guards under test, equal in all but the engine."""
    return {
        REFERENCE: Guard.load(model, "transformers", policy=POLICY, dtype="fp32"),
        "transformers": Guard.load(model, "transformers", policy=POLICY),
        "openvino, fp32": Guard.load(model, "openvino", policy=POLICY, dtype="fp32"),
        "openvino": Guard.load(model, "openvino", policy=POLICY),
    }


def labels(guard: Guard, rows: Sequence[Exchange], mode: Mode) -> list[tuple[Label, Label]]:
    return [(verdict.request.label, verdict.response.label) for verdict in guard.moderate_batch(rows, mode=mode)]


def throughput(guards: dict[str, Guard], rows: Sequence[Exchange], mode: Mode, repeats: int) -> None:
    """Batches, then one exchange at a time."""
    batch: dict[str, list[float]] = {name: [] for name in guards}
    single: dict[str, list[float]] = {name: [] for name in guards}
    for turn in range(repeats + 1):
        for name, guard in guards.items():
            seconds, _ = timed(partial(labels, guard, rows, mode))
            each = [timed(partial(labels, guard, [row], mode))[0] for row in rows[:SINGLE]]
            if turn:
                batch[name].append(seconds)
                single[name].append(statistics.median(each))
    print(f"\n{mode} mode, {len(rows)} exchanges in batches, and {SINGLE} one at a time; medians of {repeats}")
    chosen = statistics.median(batch["transformers"]), statistics.median(single["transformers"])
    for name in guards:
        together, alone = statistics.median(batch[name]), statistics.median(single[name])
        print(
            f"  {name:20} {len(rows) / together:7.1f} verdicts/s ({chosen[0] / together:4.2f}x)   "
            f"{1000 * alone:7.1f} ms one at a time ({chosen[1] / alone:4.2f}x)"
        )


def same_verdicts(guards: dict[str, Guard], rows: Sequence[Exchange], mode: Mode) -> None:
    """Labels of request and response, of the whole guard with its calibration, beside the reference's."""
    judged: dict[str, list[tuple[Label, Label]]] = {}
    print(f"\n{mode} mode, {len(rows):,} held-out rows of public sets: verdicts equal to those of {REFERENCE}")
    for name, guard in guards.items():
        seconds, judged[name] = timed(partial(labels, guard, rows, mode))
        equal = agreement(judged[name], judged[REFERENCE])
        print(f"  {name:20} {100 * equal:6.2f}%   {len(rows) / seconds:7.1f} verdicts/s", flush=True)


def held_out(data: Path, count: int) -> list[Exchange]:
    """About `count` rows, the same number of each set."""
    loaded = public_sets(data, max(1, count // 40)).loaded
    most = max(1, -(-count // len(loaded)))
    return [Exchange(row.prompt, response=row.response) for one in loaded for row in one.samples[:most]][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", type=Path, help="the folder of the public sets; without it no verdicts are compared")
    parser.add_argument("--rows", type=int, default=2000, help="held-out rows in fast mode")
    parser.add_argument("--slow-rows", type=int, default=200, help="held-out rows in slow mode")
    parser.add_argument("--exchanges", type=int, default=96, help="made-up exchanges whose rate is measured")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    be_quiet()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for engine in ("transformers", "openvino"):
        print(f"\n{engine}:", end="")
        cold(arguments.model, arguments.repeats, engine)
    guards = arms(arguments.model)
    print(f"\nmodel {guards[REFERENCE].model.name} {guards[REFERENCE].model.revision}")
    for mode in SPEED_MODES:
        throughput(guards, exchanges(arguments.exchanges), mode, arguments.repeats)
    if arguments.data:
        rows = held_out(arguments.data, arguments.rows)
        same_verdicts(guards, rows, "fast")
        same_verdicts(guards, rows[:: max(1, len(rows) // arguments.slow_rows)], "slow")


if __name__ == "__main__":
    main()
