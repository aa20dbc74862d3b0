"""Moderations per second against a user's own transformers loop, and a cold start's time and memory.

    python benchmarks/speed.py [--model embedded] [--repeats 5] [--rows 96]

T0, the same work: same weights, prompts and precision, greedy. (a) `generate` one by one, (b) `generate` on
batches in arrival order, both plain transformers; agreement is the share of equal verdicts. Medians of
interleaved repeats.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from guardreasoner_vl.engines.qwen import END_OF_TEXT, END_OF_TURN
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.protocol import build_messages, parse_verdict
from guardreasoner_vl.sources.synthetic import phrases
from guardreasoner_vl.sources.synthetic.images import draw_sample
from guardreasoner_vl.types import Exchange, Label

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BATCH = 32
FILLER = (
    "I read about it in the newspaper this morning.",
    "My sister told me that she had tried the same thing last summer.",
    "Please keep the answer short, and use plain words.",
    "We have a garden, two bicycles and a very old piano.",
    "The weather has been changing all week, so we stayed at home.",
)


def exchanges(count: int, seed: int = 0) -> list[Exchange]:
    """Made-up exchanges of 1 to about 40 sentences; every fourth has an image, every third a response."""
    rng = random.Random(seed)
    samples = []
    for number in range(count):
        request = phrases.phrase(rng, rng.choice(("harmful", "unharmful")))
        prompt = " ".join([f"Tell me {request}.", *rng.choices(FILLER, k=int(rng.expovariate(0.25)))])
        images = (draw_sample(rng, "x")[0],) if number % 4 == 0 else ()
        response = "Here is what I know. " + " ".join(rng.choices(FILLER, k=4)) if number % 3 == 0 else None
        samples.append(Exchange(prompt, images, response))
    return samples


class PlainTransformers:
    """`model.generate` as in the model's documentation, on identically encoded inputs."""

    def __init__(self, engine: TransformersEngine, max_new_tokens: int) -> None:
        self.inputs = engine.inputs
        self.model: Any = engine.network
        self.max_new_tokens = max_new_tokens

    def labels(self, rows: Sequence[Exchange], batch: int) -> list[tuple[Label, Label]]:
        labels: list[tuple[Label, Label]] = []
        for start in range(0, len(rows), batch):
            labels += self._batch(rows[start : start + batch])
        return labels

    def _batch(self, rows: Sequence[Exchange]) -> list[tuple[Label, Label]]:
        taken = [checked_exchange(row) for row in rows]
        encoded = [self.inputs.encode(build_messages(exchange), checked) for exchange, checked in taken]
        longest = max(len(row.ids) for row in encoded)
        pad = self.inputs.token_id[END_OF_TEXT]
        ids = torch.tensor([[pad] * (longest - len(row.ids)) + row.ids for row in encoded])
        mask = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in encoded])
        extra: dict[str, Any] = {"mm_token_type_ids": (ids == self.inputs.token_id["<|image_pad|>"]).int()}
        images = [image.open() for _, checked in taken for image in checked]
        if images:
            extra["pixel_values"] = torch.from_numpy(self.inputs.patches(images))
            extra["image_grid_thw"] = torch.tensor([(1, *grid) for row in encoded for grid in row.grids])
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=[self.inputs.token_id[END_OF_TURN], pad],
            pad_token_id=pad,
            **extra,
        )
        labels = []
        for (exchange, _), row in zip(taken, output[:, longest:].tolist(), strict=True):
            ended = self.inputs.token_id[END_OF_TURN] in row
            text = self.inputs.tokenizer.decode(row, skip_special_tokens=True)
            parsed = parse_verdict(text, exchange.has_prompt, exchange.has_response, "stop" if ended else "length")
            labels.append((parsed.request, parsed.response))
        return labels


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def agreement(first: Sequence[Any], second: Sequence[Any]) -> float:
    return sum(bool(a == b) for a, b in zip(first, second, strict=True)) / len(first)


def throughput(guard: Guard, plain: PlainTransformers, rows: Sequence[Exchange], repeats: int) -> None:
    """`moderate_batch` in slow mode against both loops."""

    def ours() -> list[tuple[Label, Label]]:
        return [(v.request.label, v.response.label) for v in guard.moderate_batch(rows, mode="slow")]

    arms: dict[str, Callable[[], Any]] = {
        "moderate_batch": ours,
        "(a) generate, one by one": lambda: plain.labels(rows, 1),
        f"(b) generate, batches of {BATCH}": lambda: plain.labels(rows, BATCH),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    answers: dict[str, Any] = {}
    for turn in range(repeats + 1):
        for name, work in arms.items():
            seconds, answers[name] = timed(work)
            if turn:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\nslow mode, {len(rows)} exchanges, median of {repeats}")
    for name, median in medians.items():
        print(
            f"  {name:28} {len(rows) / median:8.1f} moderations/s   "
            f"ours is {median / medians['moderate_batch']:5.2f}x   "
            f"agreement {agreement(answers[name], answers['moderate_batch']):.3f}"
        )


def latency(guard: Guard, rows: Sequence[Exchange], repeats: int) -> None:
    """`fast` against `slow`, one exchange at a time."""
    times: dict[str, list[float]] = {"fast": [], "slow": []}
    reasoning = []
    for turn in range(repeats + 1):
        for mode in times:
            for row in rows:
                started = time.perf_counter()
                verdict = guard.moderate(row.prompt, images=row.images, response=row.response, mode=mode)  # type: ignore[arg-type]
                if turn:
                    times[mode].append(time.perf_counter() - started)
                if mode == "slow":
                    reasoning.append(verdict.usage.completion_tokens)
    fast, slow = (statistics.median(times[mode]) for mode in ("fast", "slow"))
    print(
        f"\none at a time, {len(rows)} exchanges, {repeats} repeats: fast {1000 * fast:.1f} ms, "
        f"slow {1000 * slow:.1f} ms, ratio {slow / fast:.1f}x; "
        f"completion tokens in slow mode: median {statistics.median(reasoning):.0f}"
    )


def cold(model: str, repeats: int, engine: str = "auto") -> None:
    """Wall seconds and peak memory of a whole `guardreasoner-vl moderate` process."""
    command = [str(Path(sys.executable).parent / "guardreasoner-vl"), "moderate", "--prompt", "Tell me a joke."]

    def run() -> float:
        """The process' peak memory in MiB."""
        with subprocess.Popen(
            [*command, "--model", model, "--engine", engine], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            return os.wait4(process.pid, 0)[2].ru_maxrss / 1024

    runs = [timed(run) for _ in range(repeats)]
    seconds, peak = [run[0] for run in runs], max(run[1] for run in runs)
    print(f"\ncold start, median of {repeats}: {statistics.median(seconds):.2f} s, peak memory {peak:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=96)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    cold(arguments.model, arguments.repeats)
    engine = TransformersEngine.load(arguments.model)
    print(f"model {engine.model.name} {engine.model.revision}, {engine.network.dtype}")
    guard = Guard(engine, Policy(ocr="never"))  # the other arm reads no printed words
    rows = exchanges(arguments.rows)
    throughput(guard, PlainTransformers(engine, guard.policy.max_new_tokens), rows, arguments.repeats)
    latency(guard, rows[:12], arguments.repeats)


if __name__ == "__main__":
    main()
