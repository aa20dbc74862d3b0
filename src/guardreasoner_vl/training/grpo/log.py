"""GRPO's log: a row for each rollout batch, in `log.jsonl` and for TensorBoard, and the training figure.

Row 0 holds the validation of the start model. The best step is computed from the rows, so a resume finds it again.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import MissingExtraError
from guardreasoner_vl.evaluation.figures import OTHER, OWN, THIRD, new_axes, svg_of
from guardreasoner_vl.storage.atomic import write_text
from guardreasoner_vl.storage.jsonl_log import Format, JsonlLog, read_rows
from guardreasoner_vl.training.model_folder import written

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import Self

    from guardreasoner_vl.training.grpo.ranks import DistributedContext
    from guardreasoner_vl.training.grpo.rollouts import RolloutGroup
    from guardreasoner_vl.training.grpo.update import UpdateFigures

LogRow = dict[str, Any]
LOG = "log.jsonl"
_PARTS = ("total", "safety", "accuracy", "format", "length")


class Log:
    """The log, opened at `step`: later rows are dropped. Only the `main` rank writes; others keep rows in memory."""

    def __init__(self, folder: Path, step: int, *, main: bool = True) -> None:
        self._folder, self._board, self._file = folder, None, ExitStack()
        if not main:
            self.rows = read_log(folder, step)
            return
        with ExitStack() as stack:
            self._log = stack.enter_context(JsonlLog(folder / LOG, _FORMAT, "`grpo`"))
            self.rows = [row for _, row in self._log.rows() if row["step"] <= step]
            self._log.cut(len(self.rows))
            with written(folder / LOG):
                self._board = _board(folder / "tensorboard", self.rows[-1]["step"] + 1 if self.rows else 0)
            self._file = stack.pop_all()

    def append(self, row: LogRow) -> None:
        """Write one more row, which is on the disk when this returns. Raises `DataError` if the disk is full."""
        self.rows.append(row)
        if self._board is None:
            return
        self._log.append([json.dumps(row).encode() + b"\n"])
        with written(self._folder / LOG):
            for name, value in _numbers(row):
                self._board.add_scalar(name, value, row["step"])
            self._board.flush()

    @property
    def best(self) -> LogRow | None:
        """The row with the highest validation F1, the first of equal ones; None without validation."""
        return max(_validated(self.rows), key=lambda row: float(row["validation"]["f1"]), default=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            with suppress(OSError):  # every row was flushed, and later errors were raised already
                self._board.close()
        self._file.close()


def batch_figures(
    groups: Sequence[RolloutGroup], updates: Sequence[UpdateFigures], ranks: DistributedContext
) -> dict[str, float]:
    """Figures of a rollout batch: means over all ranks' completions, groups and updates.

    `clip_fraction` excludes the first update, whose ratio is 1.
    """
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
    return {
        **{name: part / answers for name, part in zip(("reward", *_PARTS[1:]), parts, strict=True)},
        "tokens": tokens / answers,
        "with_signal": signals / count,
        "clip_fraction": clipped / max(1.0, later),
        "loss": loss / len(updates),
    }


def read_log(folder: Path, step: int) -> list[LogRow]:
    """The rows up to `step`; later steps are done again, and a last line without a line end (a kill) is dropped."""
    path = folder / LOG
    rows = read_rows(path, _FORMAT, torn=True) if path.is_file() else ()
    return [row for row in rows if row["step"] <= step]


def _row(line: bytes) -> LogRow:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("no step")
    return row


_FORMAT = Format(_row, "a row of the log", key=lambda row: row["step"])


def draw_training(folder: Path, rows: Sequence[LogRow]) -> Path:
    """Write `training.svg`: response length and reward (paper, Fig. 7), clipping and B_s, validation F1."""
    figure, first = new_axes(9, 6)
    figure.delaxes(first)
    axes = figure.subplots(2, 2)
    trained = [row for row in rows if row["step"]]
    steps = [row["step"] for row in trained]
    for place, title, curves in (
        (axes[0][0], "completion tokens", (("tokens", OWN),)),
        (axes[0][1], "reward", (("safety", OWN), ("format", OTHER))),
        (axes[1][0], "share of clipped tokens, and B_s", (("clip_fraction", OWN), ("bound", THIRD))),
    ):
        for name, colour in curves:
            place.plot(steps, [row[name] for row in trained], color=colour, label=name)
        place.set_title(title, fontsize=9)
        place.legend(frameon=False, fontsize=8)
    judged = [(row["step"], row["validation"]["f1"]) for row in _validated(rows)]
    axes[1][1].plot(*zip(*judged, strict=True), marker="o", color=OWN) if judged else None
    axes[1][1].set_title("validation F1", fontsize=9)
    path = folder / "training.svg"
    write_text(path, svg_of(figure))
    return path


def _board(folder: Path, from_step: int) -> Any:
    """A TensorBoard writer that hides what an earlier process wrote for `from_step` and later steps."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "train") from error
    return SummaryWriter(str(folder), purge_step=from_step)


def _numbers(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a row by its name; nested names are joined as outer/inner."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{before}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{before}{name}", value


def _validated(rows: Sequence[LogRow]) -> list[LogRow]:
    return [row for row in rows if row.get("validation")]
