"""Every stage on a few mild rows, run in a process of its own that can be killed, held up or starved at any point.

A point is a change that the stage makes below its folder: a file opened to be written, renamed, cut off or removed, a
line appended, a flush to the disk. Points are counted, so that a seeded number names the same one each time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.batch.moderate import run_batch
from guardreasoner_vl.corpus.store import CorpusInfo, read_corpus, write_corpus
from guardreasoner_vl.engines import faults
from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.errors import EngineError, GuardError
from guardreasoner_vl.evaluation.benchmarks.find import from_file
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.recipe import parse_recipe
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.stages import augment, calibrate, curate, evaluate, mine, robustness, synthesize
from guardreasoner_vl.storage.atomic import PARTIAL
from guardreasoner_vl.storage.jsonl_log import JsonlLog
from guardreasoner_vl.teachers.offline import RulesTeacher
from guardreasoner_vl.types import ModelInfo
from tests.builders import answer
from tests.training import toy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from guardreasoner_vl.engines.base import EngineRequest

ROWS = 48
FAULTS = 4
"""So few rows without an answer stop a run here."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
_CHANGES = {"os.rename", "os.truncate", "os.remove", "os.mkdir", "os.rmdir"}


@dataclass(frozen=True)
class Plan:
    """What happens to a run: it is killed at the point `kill`, and waits at the point `hold` for the file `go`.

    `disk` bounds a file's bytes; the engine fails from its question `ill` on; `model` is its name.
    """

    kill: int | None = None
    hold: int | None = None
    go: Path | None = None
    disk: int | None = None
    ill: int | None = None
    model: str = "scripted"


class Engine(ScriptedEngine):
    """Says harmful where BAD stands; one answer of a row in two is right."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._count = plan, 0
        super().__init__(self._said, scores=self._scored)

    @property
    def model(self) -> ModelInfo:
        return ModelInfo(name=self._plan.model)

    def _said(self, request: EngineRequest) -> str:
        self._asked()
        harmful = ("BAD" in request.messages[-1].text) != bool((request.seed or 0) % 2)
        label = "harmful" if harmful else "unharmful"
        return answer(label)

    def _scored(self, request: EngineRequest, slot: str) -> tuple[float, ...]:
        if request.forced_prefix:
            self._asked()
        return (-0.1, -2.5) if "BAD" in request.messages[-1].text else (-2.0, -0.2)

    def _asked(self) -> None:
        self._count += 1
        if self._plan.ill is not None and self._count > self._plan.ill:
            raise EngineError("out of order; try again")


def prepare(root: Path) -> None:
    """What the stages read."""
    rows = [
        {
            "id": f"r{n}",
            "source": "toy",
            "modality": "text",
            "prompt": f"{'BAD' if n % 2 else 'good'} cake {n}",
            "request_label": "harmful" if n % 2 else "unharmful",
        }
        for n in range(ROWS)
    ]
    asked = [{"id": row["id"], "prompt": row["prompt"]} for row in rows]
    for name, content in (("rows", rows), ("in", asked)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    write_corpus(root / "corpus", CorpusInfo(name="toy"), read_samples(root / "rows.jsonl"))
    toy.write_data(root / "data", toy.rows(ROWS // 4))
    write_corpus(root / "hard", CorpusInfo(name="toy"), read_samples(root / "data" / "toy" / "train.jsonl"))


def _batch(root: Path, out: Path, plan: Plan) -> None:
    out.mkdir(exist_ok=True)
    run_batch(Guard(Engine(plan)), root / "in.jsonl", out / "verdicts.jsonl", chunk=3)


def _evaluate(root: Path, out: Path, plan: Plan) -> None:
    evaluate.run(Guard(Engine(plan)), [from_file(root / "rows.jsonl")], out, chunk=3)


def _robustness(root: Path, out: Path, plan: Plan) -> None:
    robustness.run(Guard(Engine(plan)), [from_file(root / "rows.jsonl")], out, names=["upper case"])


def _calibrate(root: Path, out: Path, plan: Plan) -> None:
    out.mkdir(exist_ok=True)
    calibrate.run(Guard(Engine(plan)), [from_file(root / "rows.jsonl")], out / "calibration.json")


def _mine(root: Path, out: Path, plan: Plan) -> None:
    recipe = parse_recipe({"name": "hard", "seed": 1, "mine": {"max_new_tokens": 64, "keep": "mixed"}})
    mine.run(recipe, root / "corpus", Guard(Engine(plan)), out, chunk=3)


def _synthesize(root: Path, out: Path, plan: Plan) -> None:
    synthesize.run(out, RulesTeacher(), concurrency=1)


def _curate(root: Path, out: Path, plan: Plan) -> None:
    recipe = parse_recipe(
        {"name": "toy", "seed": 1, "data": {"sources": [toy.SOURCE], "synthetic_images": {"count": 2}}}
    )
    curate.run(recipe, root / "data", out)


def _augment(root: Path, out: Path, plan: Plan) -> None:
    augment.run(parse_recipe({"name": "toy", "seed": 1, "augment": {"share": 0.3}}), root / "hard", out)


def _sft(root: Path, out: Path, plan: Plan) -> None:
    from guardreasoner_vl.stages import sft

    sft.run(toy.recipe(epochs=1), root / "data", out)


def _grpo(root: Path, out: Path, plan: Plan) -> None:
    from guardreasoner_vl.stages import grpo
    from tests.training.grpo import toy_grpo

    toy_grpo.install(pytest.MonkeyPatch())
    model = root / ("tiny" if plan.model == "scripted" else plan.model)
    rows = list(read_corpus(root / "hard"))
    grpo.run(toy_grpo.recipe(steps=2), model, root / "hard", out, rows)


STAGES: dict[str, Callable[[Path, Path, Plan], None]] = {
    "batch": _batch,
    "evaluate": _evaluate,
    "robustness": _robustness,
    "calibrate": _calibrate,
    "mine": _mine,
    "synthesize": _synthesize,
    "curate": _curate,
    "augment": _augment,
    "sft": _sft,
    "grpo": _grpo,
}


def work(stage: str, root: Path, out: Path, plan: Plan, report: Path) -> None:
    """Run the stage by the plan; `report` gets the error's line, if there is one, and how many points there were."""
    if stage == "synthesize" and not out.exists():
        shutil.copytree(root / "corpus", out)
    points = _Points(out, plan)
    points.watch()
    pytest.MonkeyPatch().setattr(faults, "FAULTS_IN_A_ROW", FAULTS)
    error = ""
    before = _bound(plan.disk)
    try:
        STAGES[stage](root, out, plan)
    except GuardError as raised:
        error = f"{type(raised).__name__}: {raised}"
    finally:
        points.off = True
        _bound(before)
    report.write_text(json.dumps({"error": error, "points": points.count}))


class _Points:
    def __init__(self, out: Path, plan: Plan) -> None:
        self.count, self.off = 0, False
        self._out, self._plan = str(out), plan

    def watch(self) -> None:
        """Count changes from now on."""
        flush, append, replace = os.fsync, JsonlLog.append, JsonlLog.replace

        def fsync(file: Any) -> None:
            self._reached()
            flush(file)

        def torn_append(log: JsonlLog[Any], lines: Iterable[bytes], *, sync: bool = True) -> None:
            content = b"".join(lines)
            self._tears(log.path, content)
            append(log, [content], sync=sync)

        def torn_replace(log: JsonlLog[Any], lines: Iterable[bytes]) -> None:
            partial = log.path.with_name(f"{log.path.name}{PARTIAL}")

            def reaching() -> Iterator[bytes]:
                for line in lines:
                    self._tears(partial, line)
                    yield line

            replace(log, reaching())

        patch = pytest.MonkeyPatch()  # for good: the process ends with the run
        patch.setattr(os, "fsync", fsync)
        patch.setattr(JsonlLog, "append", torn_append)
        patch.setattr(JsonlLog, "replace", torn_replace)
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if (opened or event in _CHANGES) and self._out in str(arguments[0]):
            self._reached()

    def _tears(self, path: Path, content: bytes) -> None:
        """A point at which half of the content is in the file."""
        self._reached(lambda: _write_half(path, content))

    def _reached(self, torn: Callable[[], object] = lambda: None) -> None:
        if self.off:
            return
        self.count += 1
        if self.count == self._plan.kill:
            torn()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count == self._plan.hold and self._plan.go is not None:
            self._plan.go.with_suffix(".held").touch()
            deadline = time.monotonic() + 60
            while not self._plan.go.exists() and time.monotonic() < deadline:
                time.sleep(0.01)


def _write_half(path: Path, content: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(content[: len(content) // 2])


def _bound(size: int | None) -> int | None:
    """Bound a file's bytes; the bound before."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return soft
