"""What a teacher answered about a corpus's rows: `reasoning.jsonl`, one line for each attempt, only ever appended to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.types import Frozen, GoldLabel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guardreasoner_vl.types import Sample

REASONING = "reasoning.jsonl"


class Attempt(Frozen):
    """One answer of a teacher about the row `id`: the reasoning that was kept, or the reason why none was.

    `request_label` and `response_label` are labels that the teacher gave to an unlabelled row, `votes` how many
    of its answers said so.
    """

    id: str
    reasoning: str | None = None
    reason: str | None = None
    final: bool = False
    """Whether the row is not asked about again although nothing was kept."""
    teacher: str
    request_label: GoldLabel | None = None
    response_label: GoldLabel | None = None
    votes: dict[str, int] = {}
    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)

    def applied(self, sample: Sample) -> Sample:
        """The sample with what was kept; labels that it has already stay."""
        update = {
            "reasoning": self.reasoning or sample.reasoning,
            "request_label": sample.request_label or self.request_label,
            "response_label": sample.response_label or self.response_label,
            "meta": {**sample.meta, "teacher": self.teacher, **({"votes": self.votes} if self.votes else {})},
        }
        return sample.model_copy(update=update)


def read_attempts(path: Path) -> Iterator[Attempt]:
    """All attempts, in the order in which they were made; a line torn by a kill is left out. Raises `DataError`."""
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield Attempt.model_validate_json(line)
            except ValidationError as error:
                raise DataError(f"{path}, line {number}: not an attempt; remove the line") from error


def kept(path: Path) -> dict[str, Attempt]:
    """The attempts whose reasoning was kept, by row."""
    return {attempt.id: attempt for attempt in read_attempts(path) if attempt.reasoning is not None}
