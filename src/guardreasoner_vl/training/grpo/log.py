"""GRPO's log: a row for each rollout batch, in `log.jsonl` and for the trackers, and the training figure.

Row 0 holds the validation of the start model. The best step is computed from the rows, so a resume finds it again.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from guardreasoner_vl.evaluation.figures import OTHER, OWN, THIRD, new_axes, svg_of
from guardreasoner_vl.rl.importance import sampler_gap
from guardreasoner_vl.storage.atomic import write_text
from guardreasoner_vl.storage.jsonl_log import Format, JsonlLog, read_log_rows
from guardreasoner_vl.training.model_folder import written
from guardreasoner_vl.training.trackers import LearningCurves

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Self

    from guardreasoner_vl.recipe import Recipe
    from guardreasoner_vl.training.grpo.ranks import DistributedContext
    from guardreasoner_vl.training.grpo.rollouts import RolloutGroup
    from guardreasoner_vl.training.grpo.update import UpdateFigures

LOG = "log.jsonl"
_PARTS = ("total", "safety", "accuracy", "format", "length")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """F1 on the validation rows (0 where undefined), coverage (None without labels), and mean tokens of an answer."""

    f1: float
    coverage: float | None = None
    tokens: float | None = None


@dataclass(frozen=True, kw_only=True)
class LogRow:
    """One row of the log; None for a field that the row lacks. Row 0, before any training, lacks most of them.

    `bound` is B_s. `reward` to `length` are the reward and its parts, and `tokens` the length, means over completions;
    `with_signal` is the share of groups whose rewards differ. `clip_fraction` (a share of tokens, without the first
    update, whose ratio is 1), `loss` and `gradient_norm` (before clipping) are means over updates. `sampler_gap`,
    `sampler_gap_p99` and `effective_samples` tell how far the trainer's log-probabilities are from those of a sampler
    other than the network (`rl.importance.SamplerGap`), over the groups with signal. `begun_with` has the digests of
    what the run began with.
    """

    step: int
    bound: float | None = None
    reward: float | None = None
    safety: float | None = None
    accuracy: float | None = None
    format: float | None = None
    length: float | None = None
    tokens: float | None = None
    with_signal: float | None = None
    clip_fraction: float | None = None
    loss: float | None = None
    gradient_norm: float | None = None
    sampler_gap: float | None = None
    sampler_gap_p99: float | None = None
    effective_samples: float | None = None
    rollout_seconds: float | None = None
    update_seconds: float | None = None
    validation: Validation | None = None
    begun_with: dict[str, str] | None = None

    def as_json(self) -> dict[str, Any]:
        """The row's line in the log: the fields that it has, in this order."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Log:
    """The log, opened at `step`: later rows are dropped. Only the `main` rank writes; others keep rows in memory.

    Raises `TrackerError` if one of the recipe's trackers cannot start.
    """

    def __init__(self, folder: Path, step: int, recipe: Recipe, *, main: bool = True) -> None:
        self._folder, self._open = folder, ExitStack()
        self._curves: LearningCurves | None = None
        if not main:
            self.rows = read_log(folder, step)
            return
        with ExitStack() as stack:
            self._log = stack.enter_context(JsonlLog(folder / LOG, _FORMAT, "`grpo`"))
            self.rows = [row for _, row in self._log.rows() if row.step <= step]
            self._log.cut(len(self.rows))
            first = self.rows[-1].step + 1 if self.rows else 0
            with written(folder / LOG):
                self._curves = stack.enter_context(LearningCurves(recipe, "grpo", folder, first))
            self._open = stack.pop_all()

    def append(self, row: LogRow) -> None:
        """Write one more row, which is on the disk when this returns. Raises `DataError` if the disk is full."""
        self.rows.append(row)
        if self._curves is None:
            return
        content = row.as_json()
        self._log.append([json.dumps(content).encode() + b"\n"])
        with written(self._folder / LOG):
            self._curves.log(content, row.step)

    @property
    def best(self) -> LogRow | None:
        """The row with the highest validation F1, the first of equal ones; None without validation."""
        judged = _f1_of(self.rows)
        return max((row for row in self.rows if row.step in judged), key=lambda row: judged[row.step], default=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def batch_row(
    step: int, groups: Sequence[RolloutGroup], updates: Sequence[UpdateFigures], ranks: DistributedContext
) -> LogRow:
    """The row of a rollout batch with its means over all ranks' completions, groups and updates."""
    completions = [rollout for group in groups for rollout in group.completions]
    *parts, tokens, answers, signals, count, loss, clipped, later = ranks.sum(
        [
            *(sum(getattr(rollout.reward, part) for rollout in completions) for part in _PARTS),
            sum(len(rollout.ids) for rollout in completions),
            len(completions),
            sum(group.has_signal for group in groups),
            len(groups),
            sum(update.loss for update in updates),
            sum(update.clipped for update in updates[1:]),
            sum(update.tokens for update in updates[1:]),
        ]
    )
    reward, safety, accuracy, form, length = (part / answers for part in parts)
    differences = ranks.gathered(torch.cat([update.differences for update in updates]))
    gap = sampler_gap(differences) if len(differences) else None
    return LogRow(
        step=step,
        reward=reward,
        safety=safety,
        accuracy=accuracy,
        format=form,
        length=length,
        tokens=tokens / answers,
        with_signal=signals / count,
        clip_fraction=clipped / max(1.0, later),
        loss=loss / len(updates),
        sampler_gap=gap.mean if gap else None,
        sampler_gap_p99=gap.p99 if gap else None,
        effective_samples=gap.effective if gap else None,
    )


def read_log(folder: Path, step: int) -> list[LogRow]:
    """The rows up to `step`; later steps are done again, and a last line without a line end (a kill) is dropped."""
    path = folder / LOG
    rows = read_log_rows(path, _FORMAT, torn=True) if path.is_file() else ()
    return [row for row in rows if row.step <= step]


_FORMAT = Format(TypeAdapter(LogRow).validate_json, "a row of the log", key=lambda row: row.step)


def draw_training(folder: Path, rows: Sequence[LogRow]) -> Path:
    """Write `training.svg`: response length and reward (paper, Fig. 7), clipping and B_s, validation F1."""
    figure, first = new_axes(9, 6)
    figure.delaxes(first)
    axes = figure.subplots(2, 2)
    trained = [row for row in rows if row.step]
    steps = [row.step for row in trained]
    for place, title, curves in (
        (axes[0][0], "completion tokens", (("tokens", OWN),)),
        (axes[0][1], "reward", (("safety", OWN), ("format", OTHER))),
        (axes[1][0], "share of clipped tokens, and B_s", (("clip_fraction", OWN), ("bound", THIRD))),
    ):
        for name, colour in curves:
            place.plot(steps, [getattr(row, name) for row in trained], color=colour, label=name)
        place.set_title(title, fontsize=9)
        place.legend(frameon=False, fontsize=8)
    judged = _f1_of(rows)
    axes[1][1].plot(list(judged), list(judged.values()), marker="o", color=OWN)
    axes[1][1].set_title("validation F1", fontsize=9)
    path = folder / "training.svg"
    write_text(path, svg_of(figure))
    return path


def _f1_of(rows: Sequence[LogRow]) -> dict[int, float]:
    """Validation F1 by step, in the order of the rows."""
    return {row.step: row.validation.f1 for row in rows if row.validation}
