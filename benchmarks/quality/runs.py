"""Judge one guard's rows through `evaluate` and `robustness`; a stopped run resumes in its folders."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from guardreasoner_vl.cli.terminal import progress_bar
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.sources.content import content_digest
from guardreasoner_vl.stages import robustness
from guardreasoner_vl.stages.evaluate import judge_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark
    from guardreasoner_vl.evaluation.predictions import Prediction
    from guardreasoner_vl.stages.robustness import Flips
    from guardreasoner_vl.types import Mode


class Runs:
    """The runs of one guard; `work` has the folders GUARD-POLICY/MODE/SET."""

    def __init__(self, guard: Guard, work: Path) -> None:
        self.guard = guard
        identity = json.dumps([guard.model.name, guard.model.revision, guard.settings], sort_keys=True, default=str)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        name = re.sub(r"[^\w.-]+", "-", guard.model.revision or guard.model.name)
        self.folder = work / f"{name[:24]}-{digest}"

    def judged(self, loaded: LoadedBenchmark, mode: Mode, change: str = "") -> list[Prediction]:
        """One prediction per row; `change` names the change in progress lines. Raises what `judge_rows` raises."""
        with (
            self._progress_line(f"{mode}, {loaded.benchmark.name} {change}".rstrip(), len(loaded.samples)),
            progress_bar() as progress,
        ):
            return judge_rows(self._in(mode), [loaded], self._folder(mode, [loaded]), progress=progress)

    def flips(self, loaded: Sequence[LoadedBenchmark], mode: Mode, names: Sequence[str]) -> dict[str, Flips]:
        """The flipped request labels under each change. Raises what `robustness.run` raises."""
        changed = sum(len(one.samples) for one in loaded) * len(names)
        with self._progress_line(f"{mode}, {', '.join(names)}", changed), progress_bar() as progress:
            out = self.folder / mode / "changed" / self._folder(mode, loaded).name
            return robustness.run(self._in(mode), loaded, out, names=names, progress=progress)["request"]

    def _in(self, mode: Mode) -> Guard:
        return Guard(self.guard.engine, replace(self.guard.policy, mode=mode))

    def _folder(self, mode: Mode, loaded: Sequence[LoadedBenchmark]) -> Path:
        digest = content_digest(row for one in loaded for row in one.samples)[:8]
        return self.folder / mode / f"{'-'.join(one.benchmark.name for one in loaded)}-{digest}"

    @contextmanager
    def _progress_line(self, part: str, rows: int) -> Iterator[None]:
        """Print a progress line on stderr when a part is done, since stdout may go to a file."""
        started = time.perf_counter()
        yield
        print(f"{part}: {rows:,} rows, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
