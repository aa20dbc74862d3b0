"""GRPO's log: a row for each rollout batch, in `log.jsonl` and for TensorBoard, and the training figure.

Row 0 holds the start's validation. The best step follows from the rows, so a resume finds it again.
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

    from guardreasoner_vl.training.grpo.ranks import Ranks
    from guardreasoner_vl.training.grpo.rollouts import Group
    from guardreasoner_vl.training.grpo.update import UpdateFigures

Row = dict[str, Any]
LOG = "log.jsonl"
_PARTS = ("total", "safety", "accuracy", "format", "length")


class Log:
    """The rows up to `step`, and more to come; a rank that is not `main` keeps them to itself."""

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

    def append(self, row: Row) -> None:
        """One more row, on the disk before the next rollouts. Raises `DataError`."""
        self.rows.append(row)
        if self._board is None:
            return
        self._log.append([json.dumps(row).encode() + b"\n"])
        with written(self._folder / LOG):
            for name, value in _numbers(row):
                self._board.add_scalar(name, value, row["step"])
            self._board.flush()

    @property
    def best(self) -> Row | None:
        """The row with the highest validation F1, the first of equal ones; None without validation."""
        return max(_validated(self.rows), key=lambda row: float(row["validation"]["f1"]), default=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            with suppress(OSError):  # every row was flushed; what went wrong since was told
                self._board.close()
        self._file.close()


def batch_figures(groups: Sequence[Group], updates: Sequence[UpdateFigures], ranks: Ranks) -> dict[str, float]:
    """What a rollout batch was like: means over all ranks' completions, groups and updates.

    `clip_fraction` leaves the first update out, whose ratio is 1.
    """
    completions = [one for group in groups for one in group.completions]
    *parts, tokens, answers, signals, count, loss, clipped, later = ranks.sum(
        [
            *(sum(getattr(one.reward, part) for one in completions) for part in _PARTS),
            sum(len(one.ids) for one in completions),
            len(completions),
            sum(group.has_signal for group in groups),
            len(groups),
            sum(one.loss for one in updates),
            sum(one.clipped for one in updates[1:]),
            sum(one.tokens for one in updates[1:]),
        ]
    )
    return {
        **{name: part / answers for name, part in zip(("reward", *_PARTS[1:]), parts, strict=True)},
        "tokens": tokens / answers,
        "with_signal": signals / count,
        "clip_fraction": clipped / max(1.0, later),
        "loss": loss / len(updates),
    }


def read_log(folder: Path, step: int) -> list[Row]:
    """The rows up to `step`; later ones are done again, and what a kill cut off has no line end."""
    path = folder / LOG
    rows = read_rows(path, _FORMAT, torn=True) if path.is_file() else ()
    return [row for row in rows if row["step"] <= step]


def _row(line: bytes) -> Row:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("no step")
    return row


_FORMAT = Format(_row, "a row of the log", key=lambda row: row["step"])


def draw_training(folder: Path, rows: Sequence[Row]) -> Path:
    """`training.svg`: response length and reward as in the paper's Fig. 7, clipping beside B_s, validation F1."""
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
    """A writer that hides what an earlier process wrote of `from_step` and later ones."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "train") from error
    return SummaryWriter(str(folder), purge_step=from_step)


def _numbers(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """Every figure of a row by its name; nested ones as outer/inner."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{before}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{before}{name}", value


def _validated(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("validation")]
