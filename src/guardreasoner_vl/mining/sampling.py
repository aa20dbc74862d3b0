"""Samples and grades the candidates of rows, wherever their guard runs (`guard.RowWork`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Self

from guardreasoner_vl.engines.faults import is_engine_fault
from guardreasoner_vl.errors import EngineError, GuardError, InputError
from guardreasoner_vl.images.portable import portable_exchange
from guardreasoner_vl.mining.candidates import candidate_requests, graded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.engines.base import EngineRequest, EngineResult
    from guardreasoner_vl.guard import Guard
    from guardreasoner_vl.mining.candidates import Candidates
    from guardreasoner_vl.recipe import MineSection
    from guardreasoner_vl.types import Exchange, Sample


@dataclass(frozen=True)
class SampledRow:
    """A row to sample candidates for; `exchange` is the sample's own, or has its images' bytes instead of paths."""

    sample: Sample
    exchange: Exchange

    @classmethod
    def of(cls, sample: Sample) -> Self:
        """The row of a sample that has something to judge."""
        return cls(sample, sample.exchange())


@dataclass(frozen=True)
class Unanswered:
    """The row `id` did not get all of its answers; `code` and `message` are those of the first error."""

    id: str
    code: str
    message: str


@dataclass(frozen=True)
class CandidateSampling:
    """Generates the candidates of many rows in one call of the engine, row by row, and grades them."""

    section: MineSection
    seed: int

    def __call__(self, guard: Guard, rows: Sequence[SampledRow]) -> list[Candidates | Unanswered]:
        """The grades of each row, or the error of a row that did not get all of its answers."""
        by_row = [self._requests(row) for row in rows]
        every = [request for requests in by_row if not isinstance(requests, Unanswered) for request in requests]
        results = guard.engine.generate(every) if every else []
        if len(results) != len(every):
            raise EngineError(f"the engine gave {len(results)} results for {len(every)} requests; use another engine")
        remaining = iter(results)
        return [
            requests
            if isinstance(requests, Unanswered)
            else _grade_if_answered(row.sample, list(islice(remaining, len(requests))))
            for row, requests in zip(rows, by_row, strict=True)
        ]

    def portable(self, row: SampledRow) -> SampledRow:
        """The row with its images' bytes."""
        return replace(row, exchange=portable_exchange(row.exchange))

    def unanswered(self, row: SampledRow, error: GuardError) -> Unanswered:
        """The result of a row that no guard has answered."""
        return Unanswered(row.sample.id, error.code, str(error))

    def is_unanswered(self, result: Candidates | Unanswered) -> bool:
        """Whether an answer is missing because the engine failed."""
        return isinstance(result, Unanswered) and is_engine_fault(result.code)

    def _requests(self, row: SampledRow) -> list[EngineRequest] | Unanswered:
        try:
            return candidate_requests(row.sample, row.exchange, self.section, self.seed)
        except InputError as error:
            return self.unanswered(row, error)


def _grade_if_answered(sample: Sample, answers: Sequence[EngineResult]) -> Candidates | Unanswered:
    fault = next((answer for answer in answers if answer.finish_reason == "error"), None)
    return graded(sample, answers) if fault is None else Unanswered(sample.id, fault.error_code, fault.error or "")
