"""Online RL: GRPO without KL, dynamic clipping, length-aware reward (paper, section 3.3; docs/method.md, section 5).

    for s = 1 .. s_total:   generate G answers to each prompt of rollout batch s; rewards, advantages within the group;
                            then one update for each `update_batch` of prompts, the ratio bounded by B_s

This is not TRL's trainer: prompt and image of a group go through the model once, in rollouts and in updates
(`rl.shared_prefix`), which replaces TRL's sampler, buffer, log-probabilities and loss. Tests and benchmarks compare the
update with TRL's (`training.grpo.trl_parity`). Under `accelerate launch` or `torchrun` every process works on its part
of each update's prompts (`training.grpo.ranks`); all of them read and write the same folder.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from guardreasoner_vl.corpus.store import read_split
from guardreasoner_vl.engines.model_files import folder_digest
from guardreasoner_vl.engines.qwen import QwenInputs
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.errors import DataError, GuardError
from guardreasoner_vl.images.sizes import STORE, ImageSizes
from guardreasoner_vl.recipe.run_dir import open_run_dir
from guardreasoner_vl.rl.clipping import bound
from guardreasoner_vl.rl.shared_prefix import use_shared_prefix
from guardreasoner_vl.sources.content import content_digest
from guardreasoner_vl.storage.atomic import write_json
from guardreasoner_vl.training.grpo.log import Log, LogRow, batch_row, draw_training, read_log
from guardreasoner_vl.training.grpo.optimizer import ShardedAdamW
from guardreasoner_vl.training.grpo.ranks import DistributedContext, sigterm_flag
from guardreasoner_vl.training.grpo.rollouts import fitting, roll_out
from guardreasoner_vl.training.grpo.sharding import FullyShardedAdamW, drop_gathered, gather_whole, shard, whole_weights
from guardreasoner_vl.training.grpo.state import State, check_begun, load_best, load_checkpoint, save_checkpoint
from guardreasoner_vl.training.grpo.update import Passes, PolicyNetwork, accumulate, autocast, old_log_probabilities
from guardreasoner_vl.training.grpo.validation import validate
from guardreasoner_vl.training.grpo.vllm_rollouts import VLLMSampler, check_gap
from guardreasoner_vl.training.launch import check_launch, peers_alive, shards_weights
from guardreasoner_vl.training.lora import ADAPTER, load_trainable, write_and_merge
from guardreasoner_vl.training.model_folder import write_model, written
from guardreasoner_vl.training.trackers import check_installed
from guardreasoner_vl.training.vision_attention import use_one_call
from guardreasoner_vl.types import ModelInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from guardreasoner_vl.engines.base import Engine
    from guardreasoner_vl.recipe import Recipe
    from guardreasoner_vl.training.grpo.log import Validation
    from guardreasoner_vl.training.grpo.rollouts import RolloutGroup
    from guardreasoner_vl.training.grpo.update import UpdateFigures
    from guardreasoner_vl.types import Sample

_log = logging.getLogger(__name__)


class StoppedError(GuardError):
    """The job received SIGTERM and stopped between two rollout batches."""

    code = "stopped"


class DivergedError(GuardError):
    """A reward or a gradient became NaN or infinite."""

    code = "diverged"


@dataclass(frozen=True)
class TrainingStep:
    """Progress after a rollout batch: its number, how many there are, and its row of the log."""

    step: int
    total: int
    row: LogRow


def run(
    recipe: Recipe,
    model: Path,
    data: Path,
    out: Path,
    validation: Sequence[Sample] = (),
    progress: Callable[[TrainingStep], None] | None = None,
) -> Path:
    """Train the model in the folder `model` on the corpus `data`; returns the finished model's folder in `out`.

    Resumes from the last checkpoint in `out`. The finished model is the best checkpoint by F1 on `validation`, which
    may be the start model; without validation rows it is the last one. Raises `RecipeError` if `out` holds another
    recipe or the processes cannot split a batch, `DataError` if there are fewer rows than a rollout batch takes, the
    disk is full, another process works in `out`, or the run there began with another model or other rows,
    `DivergedError` if a reward or gradient is NaN or infinite, `StoppedError` on SIGTERM, `GuardError` if several GPUs
    are visible and no launcher started this process.
    """
    check_launch()
    check_installed(recipe.tracker)
    ranks = DistributedContext.of_launch()
    ranks.check(recipe.grpo)
    folder = out / "grpo"
    finished = folder / "model"
    with peers_alive(), ExitStack() as stack:
        with ranks.all_or_none():
            if ranks.main:
                stack.enter_context(open_run_dir(out, recipe, "grpo"))
                folder.mkdir(exist_ok=True)
        if (finished / "model.safetensors").is_file():
            _log.info("%s is finished already", finished)
            return finished
        training = _Training(recipe, model, data, folder, validation, ranks, stack)
        with sigterm_flag() as sigterm_came, training.log:
            training.work(sigterm_came, progress if ranks.main else None)
        with ranks.all_or_none():
            if ranks.main:
                training.finish(model, finished)
    return finished


class _Training:
    def __init__(
        self,
        recipe: Recipe,
        model: Path,
        data: Path,
        folder: Path,
        validation: Sequence[Sample],
        ranks: DistributedContext,
        opened: ExitStack,
    ) -> None:
        self._recipe, self._section, self._seed = recipe, recipe.grpo, recipe.seed
        self._folder, self._ranks = folder, ranks
        self._inputs = QwenInputs.from_folder(model)
        sharded = shards_weights(self._section)
        self._model = _network(model, recipe, ranks.device, moved=not sharded)
        self._policy = PolicyNetwork(self._model)
        self._copy = shard(self._policy, self._section, ranks) if sharded else None
        with ranks.all_or_none():
            self._vllm = self._opened_vllm(model, opened)
        self._engine: Engine = self._vllm.engine if self._vllm else self._own_engine(model)
        with ranks.all_or_none():
            samples = list(read_split(data, "train"))
            if ranks.main:
                ImageSizes(folder.parent / STORE).measure(path for row in samples for path in row.images)
        with ranks.all_or_none():
            self._rows = self._fitting(samples, data)
        self._total = self._section.steps or self._section.epochs * self._batches
        self._validation = self._drawn(validation) if self._section.evaluate_every else []
        self._optimizer = (FullyShardedAdamW if sharded else ShardedAdamW)(self._model, self._section, ranks)
        self._passes = Passes(self._inputs, self._section, ranks.device, ranks if sharded else None)
        with ranks.all_or_none():
            digests = content_digest(self._rows), folder_digest(model), content_digest(self._validation)
            self._state = load_checkpoint(folder, self._model, self._optimizer, State(0, *digests))
            for row in read_log(folder, 0):
                if row.begun_with is not None:
                    check_begun(folder, row.begun_with, self._state)
            self.log = Log(folder, self._state.step, recipe, main=ranks.main)
        self._saved = self._state.step

    def _opened_vllm(self, model: Path, opened: ExitStack) -> VLLMSampler | None:
        """vLLM, which `opened` closes, if the recipe wants it."""
        if self._section.rollouts.engine == "transformers":
            return None
        sampler = VLLMSampler(self._model, model, self._inputs, self._section, self._ranks, self._folder)
        opened.callback(sampler.close)
        return sampler

    def _own_engine(self, model: Path) -> TransformersEngine:
        """The network itself, or its copy if the weights are sharded, as the engine."""
        network = self._copy.network if self._copy else self._model
        limits = {"max_rows": self._section.rollouts.max_rows, "max_tokens": self._section.rollouts.max_tokens}
        return TransformersEngine.of_network(network, self._inputs, ModelInfo(name=str(model)), **limits)

    def work(self, sigterm_came: Callable[[], bool], progress: Callable[[TrainingStep], None] | None) -> None:
        """Run the remaining rollout batches; save a checkpoint after every `save_every` of them and after the best.

        Once `sigterm_came` is true, rollouts stop; an update that has begun is completed first.
        """
        first = self._state.step + 1
        if self._vllm and first <= self._total:
            with self._present_weights():
                self._vllm.check(self._old)
        if self._validation and self._state.step == 0 and not self.log.rows:
            self._logged(LogRow(step=0, validation=self._validated(), begun_with=self._state.begun_with))
        while self._state.step < self._total:
            step = self._state.step + 1
            with self._saving_if_refused(), self._diverging(step), self._ranks.all_or_none():
                groups, seconds = self._rollouts(sigterm_came)
            if self._ranks.any(sigterm_came()):
                raise self._stopped()
            with self._diverging(step):
                row = self._updated(groups, step, seconds)
            if step == first and row.sampler_gap is not None:
                check_gap(row.sampler_gap, "first rollout batch")
            self._state = replace(self._state, step=step)
            every = self._section.evaluate_every
            if self._validation and every and (step % every == 0 or step == self._total):
                row = replace(row, validation=self._validated())
            self._logged(row)
            if step % self._section.save_every == 0 or step == self._total or self.log.best is row:
                self._save()
            if progress:
                progress(TrainingStep(step, self._total, row))

    def finish(self, base: Path, finished: Path) -> None:
        """Write the best weights, or the last ones without validation, the report and the figure."""
        best = self.log.best
        step = best.step if best else self._total
        model = self._model
        if step == 0 or self._copy:  # this rank has only its share of sharded weights
            model = load_trainable(base, self._recipe, "grpo")
        if step and (self._copy or step < self._total):
            load_best(self._folder, step, model)
        report = {
            "steps": self._total,
            "rows": len(self._rows),
            "best_step": step,
            "best_f1": best.validation.f1 if best and best.validation else None,
            "weights": "those of the start: no step was better" if step == 0 else f"those after rollout batch {step}",
        }
        with written(self._folder):
            draw_training(self._folder, self.log.rows)
            write_json(self._folder / "grpo.json", report)
            if self._recipe.lora:
                write_and_merge(model, str(base), base, self._folder / ADAPTER)
            write_model(model, model.state_dict(), base, finished)

    def _fitting(self, samples: Sequence[Sample], data: Path) -> list[Sample]:
        """The rows of the corpus `data` that can be trained on."""
        context = self._engine.capabilities.max_context
        sizes = ImageSizes(self._folder.parent / STORE)
        rows, skipped_rows = fitting(samples, self._inputs, self._section, context, sizes)
        if self._ranks.main:
            sources = dict(Counter(row.source for row in rows))
            report = {"rows": len(rows), "by_source": sources, "skipped": skipped_rows.reasons}
            write_json(self._folder / "data.json", report)
        if len(rows) < self._section.rollout_batch:
            raise DataError(
                f"{data}: {len(rows)} rows can be trained on, a rollout batch takes {self._section.rollout_batch} "
                f"(skipped: {skipped_rows.reasons}); mine more or lower grpo.rollout_batch"
            )
        return rows

    def _drawn(self, validation: Sequence[Sample]) -> list[Sample]:
        """A random sample of `evaluate_rows` rows, so that the first source is not the only one."""
        count = min(self._section.evaluate_rows, len(validation))
        return random.Random(f"{self._seed}-grpo-validation").sample(list(validation), count)

    @property
    def _batches(self) -> int:
        """Rollout batches of one epoch, whole ones only."""
        return len(self._rows) // self._section.rollout_batch

    def _rollouts(self, sigterm_came: Callable[[], bool]) -> tuple[list[RolloutGroup], float]:
        """This rank's groups in the order of updates, and the seconds taken; fewer groups after SIGTERM."""
        started = time.perf_counter()
        self._passes.forget()
        size = self._section.update_batch
        rows = self._batch(self._state.step)
        rank_rows = [row for start in range(0, len(rows), size) for row in self._ranks.part(rows[start : start + size])]
        seed = f"{self._seed}-{self._state.step}"
        with self._present_weights():
            groups = roll_out(rank_rows, self._engine, self._inputs, self._section, seed, sigterm_came)
        return groups, time.perf_counter() - started

    def _batch(self, step: int) -> list[Sample]:
        """The rows of rollout batch `step` for all ranks; each epoch is shuffled and drops its last, short batch."""
        size = self._section.rollout_batch
        epoch, place = divmod(step, self._batches)
        order = list(range(len(self._rows)))
        random.Random(f"{self._seed}-grpo-{epoch}").shuffle(order)
        return [self._rows[number] for number in order[place * size : (place + 1) * size]]

    def _updated(self, groups: Sequence[RolloutGroup], step: int, rollout_seconds: float) -> LogRow:
        """One update for each `update_batch` of prompts; the row for the log."""
        section, started = self._section, time.perf_counter()
        limit = bound(section.clip, step, self._total)
        size = section.update_batch // self._ranks.count
        self._model.train()
        updates = [groups[start : start + size] for start in range(0, len(groups), size)]
        # For the first update the old model is the current one.
        old = [None, *map(self._old, updates[1:])]
        figures, norms = [], []
        for update, before in zip(updates, old, strict=True):
            figures.append(self._accumulated(update, before, limit))
            norms.append(self._stepped())
        return replace(
            batch_row(step, groups, figures, self._ranks),
            bound=limit,
            gradient_norm=sum(norms) / len(norms),
            rollout_seconds=round(rollout_seconds, 3),
            update_seconds=round(time.perf_counter() - started, 3),
        )

    def _old(self, groups: Sequence[RolloutGroup]) -> torch.Tensor:
        """Log-probabilities (tokens,) of the groups by the model as it is."""
        completions = self._section.update_batch * self._section.group_size

        def work() -> torch.Tensor:
            return old_log_probabilities(self._policy, self._passes.of(groups, completions), self._section)

        logprobs = self._passes.within_memory(work)
        drop_gathered(self._policy)
        return logprobs

    def _accumulated(self, groups: Sequence[RolloutGroup], old: torch.Tensor | None, limit: float) -> UpdateFigures:
        """Compute the gradient of one update."""
        completions = self._section.update_batch * self._section.group_size

        def work() -> UpdateFigures:
            self._optimizer.zero_grad()  # an attempt that ran out of memory may have added a part
            return accumulate(self._policy, self._passes.of(groups, completions), old, limit, self._section)

        return self._passes.within_memory(work)

    def _stepped(self) -> float:
        """Clip the gradient, step, and drop the gradient; returns its norm before clipping.

        Raises `FloatingPointError` if the norm is not finite. Without signal the gradient is zero; the step then
        applies momentum and weight decay alone.
        """
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer.sum_gradients()
        norm = gather_whole(torch.nn.utils.clip_grad_norm_(parameters, self._section.max_grad_norm))
        if not norm.isfinite():
            raise FloatingPointError(
                "the gradient is NaN or infinite: lower grpo.learning_rate, or set grpo.reward.form: bounded"
            )
        self._optimizer.step()
        self._optimizer.zero_grad()  # rollouts need the memory
        return float(norm)

    def _validated(self) -> Validation:
        with self._present_weights():
            return validate(self._validation, self._engine, self._section.max_completion_length, self._ranks)

    @contextmanager
    def _present_weights(self) -> Iterator[None]:
        """The context in which the engine answers with the present weights; vLLM has a precision of its own."""
        if self._vllm:
            with self._ranks.all_or_none():  # no rank samples before the main rank has sent them
                self._vllm.renew(self._state.step)
            yield
        else:
            if isinstance(self._engine, TransformersEngine):
                self._engine.forget()
            with self._copy.filled() if self._copy else nullcontext(), autocast(self._section, self._ranks.device):
                yield

    def _logged(self, row: LogRow) -> None:
        with self._ranks.all_or_none():
            self.log.append(row)

    def _save(self) -> None:
        stored, weights, best = self._optimizer.whole_state(), whole_weights(self._model, self._ranks), self.log.best
        with self._ranks.all_or_none():
            if self._ranks.main:
                save_checkpoint(self._folder, weights, stored, self._state, (best.step,) if best else ())
        self._saved = self._state.step

    @contextmanager
    def _saving_if_refused(self) -> Iterator[None]:
        """If rollouts fail for another reason than divergence, save a checkpoint, unless the last one is up to date."""
        try:
            yield
        except GuardError as error:
            if not self._ranks.any(isinstance(error, DivergedError)) and self._saved < self._state.step:
                self._save()
            raise

    def _stopped(self) -> StoppedError:
        """Save a checkpoint if the last one is older; returns the error to raise."""
        if self._saved < self._state.step:
            self._save()
        return StoppedError(f"stopped after rollout batch {self._state.step}: the same command resumes there")

    @contextmanager
    def _diverging(self, step: int) -> Iterator[None]:
        try:
            yield
        except FloatingPointError as error:
            raise DivergedError(
                f"rollout batch {step}: {error}, with a new --out; earlier checkpoints stay, and the same command "
                "resumes from the last one"
            ) from error


def _network(folder: Path, recipe: Recipe, device: torch.device, moved: bool) -> Any:
    """The network to train on the device; not `moved` there if `shard` will move it, share by share."""
    model = load_trainable(folder, recipe, "grpo").to(device if moved else None)
    use_shared_prefix(model)
    if device.type != "cpu":
        use_one_call(model.model.visual)
    if recipe.grpo.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # which only reentrant checkpointing needs
    return model
