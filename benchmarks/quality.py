"""F1, false-positive rate and coverage of a guard beside two baselines, per source and pooled.

    python benchmarks/quality.py --recipe recipes/embedded.yaml --data DIR --out FILE.md [--model embedded]

Rows: the held-out twentieth of every source of the recipe, and the validation sets named with `--validation`.
Baselines: "always harmful", and hashed words + logistic regression trained on the recipe's training rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import track

from guardreasoner_vl.evaluation.baseline import HashedWords
from guardreasoner_vl.evaluation.metrics import Counts, count
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.recipe import load_recipe
from guardreasoner_vl.sources.jsonl import find_split, read_samples
from guardreasoner_vl.sources.mixture import build_mixture
from guardreasoner_vl.types import Label, Mode, Target, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.types import Sample

TARGETS: tuple[Target, ...] = ("request", "response")
DRAWN = "drawn"


@dataclass(frozen=True)
class Predictions:
    """One guard's labels for all rows, in order."""

    name: str
    request: list[Label]
    response: list[Label]
    tokens: float | None = None
    seconds: float | None = None


def judged(guard: Guard, rows: Sequence[Sample], mode: Mode) -> Predictions:
    """The guard's own labels in one mode."""
    started = time.perf_counter()
    verdicts: list[Verdict] = list(
        track(
            guard.moderate_batch((row.exchange() for row in rows), mode=mode),
            description=mode,
            total=len(rows),
            disable=not sys.stderr.isatty(),
        )
    )
    seconds = time.perf_counter() - started
    tokens = sum(verdict.usage.completion_tokens for verdict in verdicts) / len(verdicts)
    labels = {target: [getattr(verdict, target).label for verdict in verdicts] for target in TARGETS}
    return Predictions(mode, labels["request"], labels["response"], tokens, seconds)


def baseline(train: Sequence[Sample], rows: Sequence[Sample]) -> Predictions:
    """Hashed words + logistic regression on the same training rows."""
    labels = {}
    for target in TARGETS:
        model = HashedWords.fit(train, target)
        labels[target] = [Label.HARMFUL if p > 0.5 else Label.UNHARMFUL for p in model.probabilities(rows)]
    return Predictions("hashed words", labels["request"], labels["response"])


def tables(rows: Sequence[Sample], guards: Sequence[Predictions]) -> dict[Target, dict[str, dict[str, Counts]]]:
    """Confusion tables by target, group (a source, or a pool) and guard."""
    result: dict[Target, dict[str, dict[str, Counts]]] = {}
    for target in TARGETS:
        groups: dict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            if getattr(row, f"{target}_label") is None:
                continue
            groups[f"{row.source} ({row.split})"].append(number)
            if row.source != DRAWN and not row.meta.get("apart"):
                groups["pooled"].append(number)
                groups[f"pooled, {row.modality}"].append(number)
        result[target] = {
            name: {
                guard.name: count(
                    (getattr(rows[number], f"{target}_label"), getattr(guard, target)[number]) for number in numbers
                )
                for guard in guards
            }
            for name, numbers in sorted(groups.items(), key=lambda item: (not item[0].startswith("pooled"), item[0]))
        }
    return result


def markdown(target: Target, groups: dict[str, dict[str, Counts]], names: Sequence[str]) -> str:
    """One table: a line for each group, F1 / FPR of every guard, coverage of the judged modes."""
    head = ["rows", "harmful", *(f"{name} F1 / FPR" for name in names), "coverage fast / slow"]
    lines = [f"| {target} | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name, guards in groups.items():
        first = guards[names[0]]
        cells = [str(first.total), str(first.true_positive + first.false_negative)]
        cells += [f"{_percent(guards[guard].f1)} / {_percent(guards[guard].false_positive_rate)}" for guard in names]
        cells.append(f"{_percent(guards['fast'].coverage)} / {_percent(guards['slow'].coverage)}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _validation(folders: Sequence[str], root: Path, apart: bool) -> list[Sample]:
    rows = []
    for folder in folders:
        for row in read_samples(find_split(root / folder, "validation")):
            meta = {**row.meta, "apart": apart}
            rows.append(row.model_copy(update={"source": folder, "split": "validation", "meta": meta}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/embedded.yaml")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--validation", nargs="*", default=["figstep", "xstest_prompts"], help="pooled")
    parser.add_argument("--apart", nargs="*", default=["cm_memes", "religious_memes"], help="reported, not pooled")
    parser.add_argument("--out", type=Path, required=True, help="Markdown; the figures also go to .json")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    with tempfile.TemporaryDirectory() as work:
        mixture = build_mixture(recipe.data, arguments.data, Path(work), recipe.seed)
        held_out = [row.model_copy(update={"split": "held out"}) for row in mixture.held_out]
        rows = held_out + _validation(arguments.validation, arguments.data, apart=False)
        rows += _validation(arguments.apart, arguments.data, apart=True)
        with Guard.load(arguments.model) as guard:
            fast, slow = judged(guard, rows, "fast"), judged(guard, rows, "slow")
            model = guard.model
        always = Predictions("always harmful", [Label.HARMFUL] * len(rows), [Label.HARMFUL] * len(rows))
        shallow = baseline(mixture.train, rows)
    guards = [fast, slow, shallow, always]
    result = tables(rows, guards)
    names = [guard.name for guard in guards]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    head = (
        f"Made by `python {' '.join(sys.argv).replace(str(arguments.data), 'DIR')}` at {commit.stdout.strip()} with "
        f"model {model.name} {model.revision}, on {platform.machine()}, {platform.python_implementation()} "
        f"{platform.python_version()}. Mean completion tokens: fast {fast.tokens:.1f}, slow {slow.tokens:.1f}."
    )
    arguments.out.write_text(
        "\n\n".join([head, *(markdown(target, result[target], names) for target in TARGETS)]) + "\n", "utf-8"
    )
    figures = {
        target: {group: {name: asdict(counts) for name, counts in by.items()} for group, by in groups.items()}
        for target, groups in result.items()
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    for target in TARGETS:
        pooled = result[target]["pooled"]
        print(target, {name: _percent(counts.f1) for name, counts in pooled.items()})


if __name__ == "__main__":
    main()
