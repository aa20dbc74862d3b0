"""Online RL: GRPO without KL, dynamic clipping, length-aware safety reward (paper, section 3.3; method, section 5).

    for s = 1 .. s_total:   G answers to each prompt of rollout batch s, their rewards, advantages within the group;
                            then one update for each `update_batch` of prompts, the ratio bounded by B_s

A trainer of its own: prompt and image of a group go through the model once, in rollouts and in updates
(`rl.shared_prefix`), which leaves nothing of TRL's sampler, buffer, log-probabilities and loss; TRL is what the tests
and benchmarks hold it against (`training.grpo.trl_parity`). Under `accelerate launch` or `torchrun` every process has
its part of each update's prompts (`training.grpo.ranks`); all of them read and write the same folder.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from guardreasoner_vl.corpus.store import read_split
from guardreasoner_vl.engines.model_files import folder_digest
from guardreasoner_vl.engines.qwen import QwenInputs
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.errors import DataError, GuardError
from guardreasoner_vl.recipe.run_dir import open_run_dir
from guardreasoner_vl.rl.clipping import bound
from guardreasoner_vl.rl.shared_prefix import use_shared_prefix
from guardreasoner_vl.sources.content import content_digest
from guardreasoner_vl.storage.atomic import write_json
from guardreasoner_vl.training.grpo.log import Log, batch_figures, draw_training, read_log
from guardreasoner_vl.training.grpo.optimizer import new_optimizer, whole_state
from guardreasoner_vl.training.grpo.ranks import Ranks, told_to_stop
from guardreasoner_vl.training.grpo.rollouts import fitting, roll_out
from guardreasoner_vl.training.grpo.state import State, check_begun, load_best, load_checkpoint, save_checkpoint
from guardreasoner_vl.training.grpo.update import Passes, accumulate, autocast, old_log_probabilities
from guardreasoner_vl.training.grpo.validation import validate
from guardreasoner_vl.training.model_folder import load_for_training, write_model, written
from guardreasoner_vl.types import ModelInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from guardreasoner_vl.recipe import GrpoSection, Recipe
    from guardreasoner_vl.training.grpo.rollouts import Group
    from guardreasoner_vl.types import Sample

_log = logging.getLogger(__name__)
ROWS = 128
"""Answers that are generated at once."""


class StoppedError(GuardError):
    """The job was told to stop and did so at a rollout boundary."""

    code = "stopped"


class DivergedError(GuardError):
    """A reward or a gradient is no number any more."""

    code = "diverged"


@dataclass(frozen=True)
class Step:
    """Where training stands after a rollout batch: its number, how many there are, and the log's row."""

    step: int
    total: int
    row: dict[str, Any]


def run(
    recipe: Recipe,
    model: Path,
    data: Path,
    out: Path,
    validation: Sequence[Sample] = (),
    progress: Callable[[Step], None] | None = None,
) -> Path:
    """Train the model in the folder `model` on the corpus `data`; the folder of the finished one (`out/grpo/model`).

    Goes on from the last checkpoint in `out`. The best checkpoint by F1 on `validation` is the finished one, which may
    be the start; without validation rows it is the last one. Raises `RecipeError` if `out` holds another recipe or the
    processes cannot share a batch, `DataError` if there are fewer rows than a rollout batch takes, the disk is full,
    another process works in `out`, or it was begun with another model or other rows,
    `DivergedError` if a number is none any more, `StoppedError` on SIGTERM.
    """
    ranks = Ranks.of_launch()
    ranks.check(recipe.grpo)
    folder = out / "grpo"
    finished = folder / "model"
    with ExitStack() as stack:
        with ranks.together():
            if ranks.main:
                stack.enter_context(open_run_dir(out, recipe, "grpo"))
                folder.mkdir(exist_ok=True)
        if (finished / "model.safetensors").is_file():
            _log.info("%s is finished already", finished)
            return finished
        training = _Training(recipe, model, data, folder, validation, ranks)
        with told_to_stop() as told, training.log:
            training.work(told, progress if ranks.main else None)
        with ranks.together():
            if ranks.main:
                training.finish(model, finished)
    return finished


class _Training:
    def __init__(
        self, recipe: Recipe, model: Path, data: Path, folder: Path, validation: Sequence[Sample], ranks: Ranks
    ) -> None:
        self._section, self._seed, self._folder, self._ranks = recipe.grpo, recipe.seed, folder, ranks
        self._inputs = QwenInputs.from_folder(model)
        self._model = _network(model, self._section, ranks.device)
        info = ModelInfo(name=str(model))
        self._engine = TransformersEngine.of_network(self._model, self._inputs, info, max_rows=ROWS)
        with ranks.together():
            self._rows = self._rows_of(data)
        self._total = self._section.steps or self._section.epochs * self._batches
        self._validation = self._drawn(validation) if self._section.evaluate_every else []
        self._optimizer = new_optimizer(self._model, self._section, ranks)
        self._passes = Passes(self._inputs, self._section, ranks.device)
        with ranks.together():
            digests = content_digest(self._rows), folder_digest(model), content_digest(self._validation)
            self._state = load_checkpoint(folder, self._model, self._optimizer, State(0, *digests))
            for row in read_log(folder, 0):
                check_begun(folder, row.get("begun_with", self._state.begun_with), self._state)
            self.log = Log(folder, self._state.step, main=ranks.main)
        self._saved = self._state.step

    def work(self, told: Callable[[], bool], progress: Callable[[Step], None] | None) -> None:
        """All rollout batches that are left, a checkpoint after every `save_every` of them and after the best.

        `told` ends the rollouts at hand; an update is finished, so that it is not lost.
        """
        if self._validation and self._state.step == 0 and not self.log.rows:
            self._logged({"step": 0, "validation": self._validated(), "begun_with": self._state.begun_with})
        while self._state.step < self._total:
            step = self._state.step + 1
            with self._diverging(step), self._ranks.together():
                groups, seconds = self._rollouts(told)
            if self._ranks.any(told()):
                raise self._stopped()
            with self._diverging(step):
                row = self._updated(groups, step, seconds)
            self._state = replace(self._state, step=step)
            every = self._section.evaluate_every
            if self._validation and every and (step % every == 0 or step == self._total):
                row["validation"] = self._validated()
            self._logged(row)
            if step % self._section.save_every == 0 or step == self._total or self.log.best is row:
                self._save()
            if progress:
                progress(Step(step, self._total, row))

    def finish(self, base: Path, finished: Path) -> None:
        """Write the best weights, or the last ones, and the figure."""
        best = self.log.best
        step = best["step"] if best else self._total
        model = self._model
        if step == 0:
            model = load_for_training(base, self._section.precision)
        elif step < self._total:
            load_best(self._folder, step, model)
        report = {
            "steps": self._total,
            "rows": len(self._rows),
            "best_step": step,
            "best_f1": best["validation"]["f1"] if best else None,
            "weights": "those of the start: no step was better" if step == 0 else f"those after rollout batch {step}",
        }
        with written(self._folder):
            draw_training(self._folder, self.log.rows)
            write_json(self._folder / "grpo.json", report)
            write_model(model, model.state_dict(), base, finished)

    def _rows_of(self, data: Path) -> list[Sample]:
        rows, left = fitting(read_split(data, "train"), self._engine, self._section)
        if self._ranks.main:
            sources = dict(Counter(row.source for row in rows))
            report = {"rows": len(rows), "by_source": sources, "set_aside": left.reasons}
            write_json(self._folder / "data.json", report)
        if len(rows) < self._section.rollout_batch:
            raise DataError(
                f"{data}: {len(rows)} rows can be trained on, a rollout batch takes {self._section.rollout_batch} "
                f"(left out: {left.reasons}); mine more or lower grpo.rollout_batch"
            )
        return rows

    def _drawn(self, validation: Sequence[Sample]) -> list[Sample]:
        """`evaluate_rows` of them, so that no source that stands first has it all."""
        count = min(self._section.evaluate_rows, len(validation))
        return random.Random(f"{self._seed}-grpo-validation").sample(list(validation), count)

    @property
    def _batches(self) -> int:
        """Rollout batches of one epoch, whole ones only."""
        return len(self._rows) // self._section.rollout_batch

    def _rollouts(self, told: Callable[[], bool]) -> tuple[list[Group], float]:
        """This rank's groups, update after update; fewer if it was told to stop."""
        started = time.perf_counter()
        self._engine.forget()
        self._passes.forget()
        size = self._section.update_batch
        rows = self._batch(self._state.step)
        own = [row for start in range(0, len(rows), size) for row in self._ranks.part(rows[start : start + size])]
        seed = f"{self._seed}-{self._state.step}"
        with autocast(self._section, self._ranks.device):
            groups = roll_out(own, self._engine, self._inputs, self._section, seed, told)
        return groups, time.perf_counter() - started

    def _batch(self, step: int) -> list[Sample]:
        """The rows of that rollout batch, whatever the ranks: each epoch is an order of its own, its rest left out."""
        size = self._section.rollout_batch
        epoch, place = divmod(step, self._batches)
        order = list(range(len(self._rows)))
        random.Random(f"{self._seed}-grpo-{epoch}").shuffle(order)
        return [self._rows[number] for number in order[place * size : (place + 1) * size]]

    def _updated(self, groups: Sequence[Group], step: int, rollout_seconds: float) -> dict[str, Any]:
        """One update for each `update_batch` of prompts; the row for the log."""
        section, started = self._section, time.perf_counter()
        limit = bound(section.clip, step, self._total)
        size = section.update_batch // self._ranks.count
        completions = section.update_batch * section.group_size
        self._model.train()
        updates = [self._passes.of(groups[start : start + size], completions) for start in range(0, len(groups), size)]
        # The first update's old model is the model itself.
        old = [None, *(old_log_probabilities(self._model, passes, section) for passes in updates[1:])]
        figures, norms = [], []
        for passes, before in zip(updates, old, strict=True):
            self._optimizer.zero_grad()
            figures.append(accumulate(self._model, passes, before, limit, section))
            norms.append(self._stepped())
        return {
            "step": step,
            "bound": limit,
            **batch_figures(groups, figures, self._ranks),
            "gradient_norm": sum(norms) / len(norms),
            "rollout_seconds": round(rollout_seconds, 3),
            "update_seconds": round(time.perf_counter() - started, 3),
        }

    def _stepped(self) -> float:
        """Clip the gradient and move; its norm before. Raises `FloatingPointError` rather than move to nowhere.

        Without signal the gradient is zero, and momentum and decay still act.
        """
        parameters = [one for one in self._model.parameters() if one.requires_grad]
        self._ranks.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._section.max_grad_norm)
        if not norm.isfinite():
            raise FloatingPointError("the gradient is NaN or infinite: lower grpo.learning_rate, or use form: bounded")
        self._optimizer.step()
        return float(norm)

    def _validated(self) -> dict[str, float | None]:
        self._engine.forget()
        with autocast(self._section, self._ranks.device):
            return validate(self._validation, self._engine, self._section.max_completion_length, self._ranks)

    def _logged(self, row: dict[str, Any]) -> None:
        with self._ranks.together():
            self.log.append(row)

    def _save(self) -> None:
        stored, best = whole_state(self._optimizer, self._ranks), self.log.best
        with self._ranks.together():
            if self._ranks.main:
                save_checkpoint(self._folder, self._model, stored, self._state, (best["step"],) if best else ())
        self._saved = self._state.step

    def _stopped(self) -> StoppedError:
        """What to raise; all that was done is saved first."""
        if self._saved < self._state.step:
            self._save()
        return StoppedError(f"stopped after rollout batch {self._state.step}: the same command goes on there")

    @contextmanager
    def _diverging(self, step: int) -> Iterator[None]:
        try:
            yield
        except FloatingPointError as error:
            raise DivergedError(
                f"rollout batch {step}: {error}, with a new --out; the checkpoints before it stay, and the same "
                "command goes on there"
            ) from error


def _network(folder: Path, section: GrpoSection, device: torch.device) -> Any:
    model = load_for_training(folder, section.precision).to(device)
    use_shared_prefix(model)
    model.model.visual.requires_grad_(not section.freeze_vision)
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
