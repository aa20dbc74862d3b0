"""The packages wandb, trackio and mlflow, as far as accelerate calls them, with one server in memory."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

NAMES = ("wandb", "trackio", "mlflow")


@dataclass
class FakeRun:
    """A run at the server: every point that was reported, and the settings each time that they were."""

    id: str
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    begun: list[dict[str, Any]] = field(default_factory=list)
    ended: int = 0


class FakeServer:
    """Holds the runs by id; raises `fault` for every call while it is set."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.fault: Exception | None = None
        patch.setitem(sys.modules, "wandb", self._like_wandb("wandb", "id"))
        patch.setitem(sys.modules, "trackio", self._like_wandb("trackio", "name"))
        patch.setitem(sys.modules, "mlflow", self._mlflow())

    def _begin(self, run_id: str | None, options: dict[str, Any]) -> FakeRun:
        self._fail()
        name = run_id or f"run-{len(self.runs)}"
        run = self.runs.setdefault(name, FakeRun(name))
        run.begun.append(options)
        return run

    def _log(self, run: FakeRun, values: dict[str, float], step: int) -> None:
        self._fail()
        run.points.append((step, values))

    def _end(self, run: FakeRun) -> None:
        self._fail()
        run.ended += 1

    def _fail(self) -> None:
        if self.fault:
            raise self.fault

    def _like_wandb(self, name: str, key: str) -> Any:
        module = _module(name)

        def init(**options: Any) -> SimpleNamespace:
            run = self._begin(options[key], options)
            module.config = SimpleNamespace(update=lambda values, allow_val_change: run.settings.append(values))
            return SimpleNamespace(
                id=run.id,
                name=run.id,
                log=lambda values, step: self._log(run, values, step),
                finish=lambda: self._end(run),
            )

        module.init = init
        module.context_vars = SimpleNamespace(current_run=ContextVar("current_run", default=None))
        return module

    def _mlflow(self) -> Any:
        module = _module("mlflow")
        limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        active: list[FakeRun] = []

        def start_run(run_id: str | None, **options: Any) -> SimpleNamespace:
            active.append(self._begin(run_id, options))
            return SimpleNamespace(info=SimpleNamespace(run_id=active[-1].id))

        module.utils = SimpleNamespace(validation=limits)
        module.search_experiments = lambda filter_string: []
        module.create_experiment = lambda name, artifact_location, tags: name
        module.start_run = start_run
        module.log_params = lambda values: active[-1].settings.append(values)
        module.log_metrics = lambda metrics, step: self._log(active[-1], metrics, step)
        module.end_run = lambda: self._end(active.pop())
        return module


def _module(name: str) -> Any:
    """An empty module that counts as installed."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    return module
