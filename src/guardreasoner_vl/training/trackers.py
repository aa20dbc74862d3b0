"""Learning curves of `sft` and `grpo` in TensorBoard, Weights & Biases, Trackio and MLflow, by accelerate's trackers.

A resumed run continues its curves and reports no step twice. TensorBoard, in `FOLDER/tensorboard`, hides what an
earlier process wrote of the steps that are done again. The other trackers cannot hide anything: `FOLDER/trackers.json`
names the run at each of them and its last step, and steps up to it are not reported again. A kill between a report and
that note makes a single step appear twice.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import MissingExtraError, RecipeError, TrackerError, reason_of
from guardreasoner_vl.storage.atomic import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path
    from typing import Self

    from guardreasoner_vl.recipe import Recipe, TrackerName

_log = logging.getLogger(__name__)
PROJECT = "guardreasoner-vl"
"""The project or experiment at a tracker, unless its environment variable names another."""

RUNS = "trackers.json"


def check_installed(names: Iterable[TrackerName]) -> None:
    """Raises `RecipeError` if the package of a tracker is not installed."""
    try:
        from accelerate.tracking import get_available_trackers
    except ImportError as error:
        raise MissingExtraError("accelerate", "train") from error
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in available:
            raise RecipeError(f"tracker {name} is not installed: pip install {name}, or change `tracker` in the recipe")


@dataclass(frozen=True)
class _Run:
    """A run at a tracker: what identifies it there, and the last step that was reported; -1 for none."""

    id: str
    step: int = -1


class LearningCurves:
    """Reports the figures of a stage, from the step `first` on, to the recipe's trackers.

    `folder` is the stage's. Open it on the main rank alone. Raises `TrackerError` if a tracker cannot begin.
    """

    def __init__(self, recipe: Recipe, stage: str, folder: Path, first: int) -> None:
        self._path = folder / RUNS
        runs = json.loads(self._path.read_text("utf-8")) if self._path.is_file() else {}
        self._runs = {name: _Run(**run) for name, run in runs.items()}
        self._reported = {name: run.step for name, run in self._runs.items()}
        self._trackers: dict[str, Any] = {}
        with ExitStack() as stack:
            stack.callback(self.close)
            for name in recipe.tracker:
                with _beginning(name):
                    self._begin(name, recipe, stage, folder, first)
            self._note()
            stack.pop_all()

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Report the numbers among the figures of a step; nested names are joined as outer/inner.

        A tracker that fails gets no more figures from this process. Raises `OSError` if TensorBoard's file cannot be
        written.
        """
        numbers = dict(_named_numbers(figures))
        for name, tracker in list(self._trackers.items()):
            if step <= self._reported.get(name, -1):
                continue
            with self._dropping(name):
                tracker.log(numbers, step=step)
                if name in self._runs:
                    self._runs[name] = replace(self._runs[name], step=step)
        self._note()

    def close(self) -> None:
        """End the runs; each can be continued later."""
        for name, tracker in list(self._trackers.items()):
            with suppress(OSError), self._dropping(name):  # every figure was flushed, and later errors raised already
                tracker.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, name: TrackerName, recipe: Recipe, stage: str, folder: Path, first: int) -> None:
        """Begin a run at a tracker, with the stage's settings, or continue the one that it has."""
        begun = self._runs.get(name)
        tracker = _new_tracker(name, f"{recipe.name}-{stage}", folder, begun.id if begun else None, first)
        tracker.start()
        self._trackers[name] = tracker
        if begun is None and name in _RUN_IDS:
            tracker.store_init_configuration({"seed": recipe.seed, **recipe.model_dump(mode="json")[stage]})
            self._runs[name] = _Run(_RUN_IDS[name](tracker.tracker))

    def _note(self) -> None:
        if self._runs:
            write_json(self._path, {name: asdict(run) for name, run in self._runs.items()})

    @contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        """Give a tracker up if it fails: an unreachable server does not end the training."""
        try:
            yield
        except Exception as error:
            if name == "tensorboard":
                raise
            del self._trackers[name]
            _log.warning(
                "tracker %s failed (%s): it gets no more figures until a resume", name, _tracker_failure(error)
            )


def _new_tracker(name: TrackerName, title: str, folder: Path, run: str | None, first: int) -> Any:
    """An accelerate tracker that begins the run `title`, or continues `run`."""
    from accelerate import tracking

    if name == "tensorboard":
        return tracking.TensorBoardTracker("tensorboard", folder, purge_step=first)
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return tracking.WandBTracker(project, id=run, name=title, dir=str(folder), resume="allow")
    if name == "trackio":
        return tracking.TrackioTracker(PROJECT, name=run, group=title, resume="allow")
    return tracking.MLflowTracker(PROJECT, run_id=run, run_name=title)


_RUN_IDS: dict[str, Callable[[Any], str]] = {
    "wandb": lambda run: str(run.id),
    "trackio": lambda run: str(run.name),
    "mlflow": lambda run: str(run.info.run_id),
}
"""What identifies a run, of the trackers that hold it outside of the run folder."""


@contextmanager
def _beginning(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if name == "tensorboard":
            raise
        raise TrackerError(
            f"tracker {name} cannot begin ({_tracker_failure(error)}): correct its settings, or "
            "change `tracker` in the recipe"
        ) from error


def _tracker_failure(error: Exception) -> str:
    return f"{type(error).__name__}: {reason_of(error, 120)}"


def _named_numbers(figures: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _named_numbers(value, f"{before}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{before}{name}", value
