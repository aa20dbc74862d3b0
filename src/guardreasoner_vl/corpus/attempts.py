"""What a teacher answered about a corpus's rows: `reasoning.jsonl`, one line for each attempt, appended to for ever."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

from pydantic import Field

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.storage.jsonl_log import Format, JsonlLog, read_rows
from guardreasoner_vl.teachers.base import Tokens
from guardreasoner_vl.types import Frozen, GoldLabel, Target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guardreasoner_vl.types import Sample

Asked: TypeAlias = Literal["reasoning", "label"]

REASONING = "reasoning.jsonl"
FAULT = "teacher: "
"""How the reason of an attempt begins that got no answer."""


class Attempt(Frozen):
    """One answer of a teacher about the row `id`: the reasoning that was kept, or the reason why none was.

    Asked for a `label`, `request_label` and `response_label` are what this one answer said. Asked for `reasoning`,
    they are the labels of a row that had none, by majority, and `votes` says how many answers agree with each.
    `judged` is what the kept reasoning ends with where the row has one label and lacks the other. `cost` is in USD,
    where a price was known. `custom_id` is a batch request's.
    """

    id: str
    asked: Asked = "reasoning"
    reasoning: str | None = None
    reason: str | None = None
    final: bool = False
    """Whether the row is not asked about again although nothing was kept."""
    teacher: str
    request_label: GoldLabel | None = None
    response_label: GoldLabel | None = None
    votes: dict[str, int] = Field(default_factory=dict)
    judged: dict[Target, GoldLabel] = Field(default_factory=dict)
    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)
    cost: float | None = Field(default=None, ge=0)
    custom_id: str | None = None

    @property
    def is_fault(self) -> bool:
        """Whether no answer came."""
        return self.reason is not None and self.reason.startswith(FAULT)

    def applied(self, sample: Sample) -> Sample:
        """The sample with what was kept; labels that it has already stay."""
        told = {"teacher": self.teacher, "votes": self.votes, "judged": self.judged}
        update = {
            "reasoning": self.reasoning or sample.reasoning,
            "request_label": sample.request_label or self.request_label,
            "response_label": sample.response_label or self.response_label,
            "meta": {**sample.meta, **{name: value for name, value in told.items() if value}},
        }
        return sample.model_copy(update=update)


def read_attempts(path: Path) -> Iterator[Attempt]:
    """All attempts, in the order in which they were made; a line torn by a kill is left out. Raises `DataError`."""
    return read_rows(path, _FORMAT, torn=True) if path.is_file() else iter(())


def kept(path: Path) -> dict[str, Attempt]:
    """The attempts whose reasoning was kept, by row."""
    return {attempt.id: attempt for attempt in read_attempts(path) if attempt.reasoning is not None}


@dataclass(slots=True)
class RowState:
    """What the attempts so far mean for one row. `votes` holds the labels that each answer gave."""

    kept: bool = False
    set_aside: str | None = None
    rejections: int = 0
    complaint: str | None = None
    fault: str | None = None
    votes: list[dict[Target, GoldLabel]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the row is not asked about again."""
        return self.kept or self.set_aside is not None

    def add(self, attempt: Attempt) -> None:
        """Take one more attempt into account."""
        self.fault = attempt.reason if attempt.is_fault else None
        if attempt.reasoning is not None:
            self.kept = True
        elif attempt.final:
            self.set_aside = attempt.reason or "unknown"
        if attempt.is_fault:
            return
        if attempt.asked == "label":
            said: dict[Target, GoldLabel | None] = {
                "request": attempt.request_label,
                "response": attempt.response_label,
            }
            self.votes.append({target: label for target, label in said.items() if label})
        elif attempt.reason is not None:
            self.rejections += 1
            self.complaint = attempt.reason


@dataclass
class Ledger:
    """All attempts so far: each row's state, how many there are, and what they took.

    `cost` is that of the lines that name theirs, `unpriced` the tokens of the others.
    """

    rows: dict[str, RowState] = field(default_factory=dict)
    attempts: int = 0
    tokens: Tokens = field(default_factory=Tokens)
    cost: float = 0.0
    unpriced: Tokens = field(default_factory=Tokens)
    answered: set[str] = field(default_factory=set)
    """Batch requests that have an answer."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises `DataError` for a file that holds anything but attempts."""
        ledger = cls()
        for attempt in read_attempts(path):
            ledger.add(attempt)
        return ledger

    def state(self, row: str) -> RowState:
        """The row's state, to be kept up to date by `add`."""
        return self.rows.setdefault(row, RowState())

    def add(self, attempt: Attempt) -> None:
        """Take one more attempt into account."""
        took = Tokens(attempt.prompt_tokens, attempt.completion_tokens)
        self.attempts += 1
        self.tokens += took
        if attempt.cost is None:
            self.unpriced += took
        else:
            self.cost += attempt.cost
        if attempt.custom_id and not attempt.is_fault:
            self.answered.add(attempt.custom_id)
        self.state(attempt.id).add(attempt)


class AttemptLog:
    """The file that one process at a time appends attempts to; use it as a context manager.

    A line torn by a kill is cut off first. A line is handed to the system at once, so that it survives the
    process, and is on the disk after `sync` and at the end. Raises `DataError` if another process has the file, or the
    disk does not take a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log = JsonlLog(path, _FORMAT, "`synthesize`", "try again later")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._log)
            self._log.mend()
            self._stack = stack.pop_all()
        self._dirty = False
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            self.sync()

    def add(self, attempt: Attempt) -> None:
        """Append one line."""
        self._log.append([attempt.model_dump_json(exclude_defaults=True).encode() + b"\n"], sync=False)
        self._dirty = True

    def sync(self) -> None:
        """Put on the disk what is not there yet."""
        if self._dirty:
            self._dirty = False  # before, so that a line which comes meanwhile is not taken for synced
            try:
                self._log.sync()
            except DataError:
                self._dirty = True
                raise


_FORMAT = Format(Attempt.model_validate_json, "an attempt")
