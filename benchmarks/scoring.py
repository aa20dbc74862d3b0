"""Time to score stored answers, and the time that `evaluate` adds to the guard's own.

    python benchmarks/scoring.py [--rows 100000] [--judged 512] [--repeats 5]

Scoring: `rows` made-up answers in the authors' layout, read, parsed and counted by each rule, and as many stored
predictions summarised with intervals and baselines. Evaluation: the embedded guard in fast mode over `judged`
prompts, `moderate_batch` alone and `evaluate` around it, interleaved; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.evaluation.benchmarks.find import from_samples
from guardreasoner_vl.evaluation.external_predictions import read_external_predictions
from guardreasoner_vl.evaluation.predictions import Prediction, read_predictions
from guardreasoner_vl.evaluation.report import score_table
from guardreasoner_vl.evaluation.results import Settings, summarise
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.sources.synthetic.phrases import phrase
from guardreasoner_vl.stages import evaluate
from guardreasoner_vl.types import Judgement, Label, Sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.types import GoldLabel

LABELS: tuple[GoldLabel, GoldLabel] = ("harmful", "unharmful")
REASONING = "## Reasoning Step 1\nThe user asks for something.\n" * 8


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def stored_answers(path: Path, count: int) -> None:
    rng = random.Random(0)
    with path.open("w") as stream:
        for _ in range(count):
            truth, label = rng.choice(LABELS), rng.choice(LABELS)
            answer = f"<think>\n{REASONING}</think>\n<result>\nAnswers:\nRequest: {label}\nResponse: None\n</result>"
            prompt = "Human user:\nhow to bake a cake\n\nAI assistant:\nNone"
            row = {"prompt": prompt, "label": f"Request: {truth}\nResponse: None", "predict": answer}
            stream.write(json.dumps(row) + "\n")


def predictions(path: Path, count: int) -> None:
    rng = random.Random(0)
    absent = Judgement(label=Label.NOT_APPLICABLE)
    with path.open("w") as stream:
        for number in range(count):
            score = rng.random()
            label = Label.HARMFUL if score > 0.5 else Label.UNHARMFUL
            row = Prediction(
                id=str(number),
                benchmark=f"set {number % 14}",
                modality="text",
                request_truth=rng.choice(LABELS),
                request=Judgement(label=label, score=score),
                response=absent,
                mode="slow",
                completion_tokens=50,
            )
            stream.write(row.model_dump_json() + "\n")


def scoring(rows: int, work: Path) -> None:
    answers, stored = work / "answers.jsonl", work / "predictions.jsonl"
    stored_answers(answers, rows)
    predictions(stored, rows)
    print(f"{rows:,} stored answers:")
    for rule in ("strict", "guardreasoner"):
        seconds = timed(lambda rule=rule: score_table(read_external_predictions(answers).rows, rule))  # type: ignore[misc]
        print(f"  score --rule {rule:<14} {seconds:6.2f} s")
    settings = Settings("toy", None, "slow")
    print(f"  figures of predictions       {timed(lambda: summarise(list(read_predictions(stored)), settings)):6.2f} s")


def overhead(judged: int, repeats: int, work: Path) -> None:
    rng = random.Random(1)
    rows = [
        Sample(id=str(at), source="toy", modality="text", prompt=phrase(rng, label), request_label=label)
        for at in range(judged)
        for label in [rng.choice(LABELS)]
    ]
    loaded = from_samples("toy", rows, work, SkippedRows())
    with Guard.load("embedded", policy=Policy(mode="fast")) as guard:

        def plain() -> None:
            for _ in guard.moderate_batch(row.exchange() for row in rows):
                pass

        plain()
        alone, evaluated = [], []
        for number in range(repeats):
            alone.append(timed(plain))
            evaluated.append(timed(lambda number=number: evaluate.run(guard, [loaded], work / str(number))))  # type: ignore[misc]
    first, second = statistics.median(alone), statistics.median(evaluated)
    print(f"\n{judged} prompts in fast mode, median of {repeats}: moderate_batch {first:.2f} s, ", end="")
    print(f"evaluate {second:.2f} s, {second / first - 1:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--judged", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.python_implementation()} {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        scoring(arguments.rows, Path(folder))
        overhead(arguments.judged, arguments.repeats, Path(folder))


if __name__ == "__main__":
    main()
