"""The append-only log of a teacher's answers about a corpus: `reasoning.jsonl`, one line per attempt."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

from pydantic import Field

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.storage.jsonl_log import Format, JsonlLog, read_log_rows
from guardreasoner_vl.teachers.base import Tokens
from guardreasoner_vl.types import Frozen, GoldLabel, Provenance, Target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guardreasoner_vl.types import Sample

Asked: TypeAlias = Literal["reasoning", "label"]

REASONING = "reasoning.jsonl"
FAULT = "teacher: "
"""Prefix of the reason of an attempt without an answer."""


class Attempt(Frozen):
    """One attempt to get an answer about the row `id`: the reasoning kept, or the reason why none was.

    If `asked` is `label`, `request_label` and `response_label` are those of this answer. If it is `reasoning`, they are
    the majority labels of a row that had none, and `votes` counts the answers that agree with each. `judged` has the
    label that the kept reasoning gives to a part whose label is unknown. `cost` is in USD, None without a price.
    `custom_id` is the id of a batch request.
    """

    id: str
    asked: Asked = "reasoning"
    reasoning: str | None = None
    reason: str | None = None
    final: bool = False
    """Whether the row is finished although nothing was kept."""
    teacher: str
    request_label: GoldLabel | None = None
    response_label: GoldLabel | None = None
    votes: dict[Target, int] = Field(default_factory=dict)
    judged: dict[Target, GoldLabel] = Field(default_factory=dict)
    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)
    cost: float | None = Field(default=None, ge=0)
    custom_id: str | None = None

    @property
    def is_fault(self) -> bool:
        """Whether the attempt got no answer."""
        return self.reason is not None and self.reason.startswith(FAULT)

    def applied(self, sample: Sample) -> Sample:
        """The sample with this attempt's reasoning and labels; existing labels are not replaced."""
        update = {
            "reasoning": self.reasoning or sample.reasoning,
            "request_label": sample.request_label or self.request_label,
            "response_label": sample.response_label or self.response_label,
        }
        known = Provenance(teacher=self.teacher, votes=self.votes, judged=self.judged)
        return sample.model_copy(update=update).with_provenance(known)


def read_attempts(path: Path) -> Iterator[Attempt]:
    """All attempts in order, without an incomplete last line. Raises `DataError`."""
    return read_log_rows(path, _FORMAT, torn=True) if path.is_file() else iter(())


def kept(path: Path) -> dict[str, Attempt]:
    """The attempts with kept reasoning, by row id."""
    return {attempt.id: attempt for attempt in read_attempts(path) if attempt.reasoning is not None}


@dataclass(slots=True)
class RowState:
    """The state of one row after its attempts; `teacher` wrote what was kept, `votes` has the labels of each answer."""

    teacher: str | None = None
    skipped: str | None = None
    rejections: int = 0
    complaint: str | None = None
    fault: str | None = None
    votes: list[dict[Target, GoldLabel]] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether the row has the reasoning of a teacher."""
        return self.teacher is not None

    @property
    def done(self) -> bool:
        """Whether the row is finished: kept or skipped."""
        return self.kept or self.skipped is not None

    def add(self, attempt: Attempt) -> None:
        """Update the state with one more attempt."""
        self.fault = attempt.reason if attempt.is_fault else None
        if attempt.reasoning is not None:
            self.teacher = attempt.teacher
        elif attempt.final:
            self.skipped = attempt.reason or "unknown"
        if attempt.is_fault:
            return
        if attempt.asked == "label":
            labels: dict[Target, GoldLabel | None] = {
                "request": attempt.request_label,
                "response": attempt.response_label,
            }
            self.votes.append({target: label for target, label in labels.items() if label})
        elif attempt.reason is not None:
            self.rejections += 1
            self.complaint = attempt.reason


@dataclass
class AttemptIndex:
    """All attempts so far: each row's state, the number of attempts, and their tokens and cost.

    `cost` (USD) sums the attempts that have one, `unpriced` the tokens of the others.
    """

    rows: dict[str, RowState] = field(default_factory=dict)
    attempts: int = 0
    tokens: Tokens = field(default_factory=Tokens)
    cost: float = 0.0
    unpriced: Tokens = field(default_factory=Tokens)
    answered: set[str] = field(default_factory=set)
    """Ids of batch requests that have an answer."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a log. Raises `DataError` for a file that holds anything but attempts."""
        index = cls()
        for attempt in read_attempts(path):
            index.add(attempt)
        return index

    def state(self, row: str) -> RowState:
        """The row's state, which `add` updates in place."""
        return self.rows.setdefault(row, RowState())

    def add(self, attempt: Attempt) -> None:
        """Add one more attempt."""
        tokens = Tokens(attempt.prompt_tokens, attempt.completion_tokens)
        self.attempts += 1
        self.tokens += tokens
        if attempt.cost is None:
            self.unpriced += tokens
        else:
            self.cost += attempt.cost
        if attempt.custom_id and not attempt.is_fault:
            self.answered.add(attempt.custom_id)
        self.state(attempt.id).add(attempt)


class AttemptLog:
    """The attempt log, open for appending by one process at a time; a context manager.

    An incomplete last line is removed on opening. Each line is written to the operating system at once, so that it
    survives the process, and to the disk by `sync` and on closing. Raises `DataError` if another process has the file
    open, or if a write fails.
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
        """Append one attempt."""
        self._log.append([attempt.model_dump_json(exclude_defaults=True).encode() + b"\n"], sync=False)
        self._dirty = True

    def sync(self) -> None:
        """Flush written lines to the disk."""
        if self._dirty:
            self._dirty = False  # cleared first, so that a line added during the sync is not taken for synced
            try:
                self._log.sync()
            except DataError:
                self._dirty = True
                raise


_FORMAT = Format(Attempt.model_validate_json, "an attempt")
