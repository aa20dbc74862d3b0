"""The rows of one job: which are judged next, which are judged again, and their results in order.

Only some rows are in memory: those that were read and whose results have not been taken. A part whose worker was lost
is tried again once and then halved, until a row that crashes its worker is alone; only that row gets an error.
"""

from __future__ import annotations

import pickle
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

from guardreasoner_vl.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from guardreasoner_vl.guard import RowWork

RowT = TypeVar("RowT")
ResultT = TypeVar("ResultT")

TRIES = 2
"""How often a part of several rows is tried before it is halved."""


@dataclass(frozen=True)
class RowRange(Generic[RowT]):
    """Consecutive rows that one worker judges at a time; `start` is the number of the first row.

    `losses` counts the workers that were lost while they judged the rows.
    """

    start: int
    rows: Sequence[RowT]
    losses: int = 0


class RowQueue(Generic[RowT, ResultT]):
    """Cuts rows into parts of `chunk` rows; reads at most `ahead` rows beyond those whose results were taken.

    No part is read while the rows without a result have `bytes_ahead` bytes, pickled with their images. A part of large
    rows ends at its share of these bytes, so that every worker gets one.
    """

    def __init__(
        self, work: RowWork[RowT, ResultT], rows: Iterable[RowT], chunk: int, ahead: int, bytes_ahead: int
    ) -> None:
        self.work = work
        self._rows, self._chunk, self._ahead = iter(rows), chunk, ahead
        self._bytes_ahead, self._part_bytes = bytes_ahead, bytes_ahead * chunk // ahead
        self._sizes: dict[int, int] = {}
        self._bytes = 0
        self._waiting: deque[RowRange[RowT]] = deque()
        self._results: dict[int, ResultT] = {}
        self._read = self._taken = 0
        self._at_end = False

    @property
    def done(self) -> bool:
        """Whether the results of all rows were taken."""
        return self._at_end and self._taken == self._read

    def next_part(self) -> RowRange[RowT] | None:
        """The next part to judge, lost ones first; None if there is none, or if too many rows are in memory."""
        if not self._waiting:
            self._read_part()
        return self._waiting.popleft() if self._waiting else None

    def add(self, part: RowRange[RowT], results: Sequence[ResultT]) -> bool:
        """Store a part's results, one for each row; returns whether they were stored.

        They are not if the engine failed every row, as a single broken worker would: the part is then tried again.
        """
        if part.losses + 1 < TRIES and all(map(self.work.is_unanswered, results)):
            self.lose(part)
            return False
        self._store(part.start, results)
        return True

    def lose(self, part: RowRange[RowT]) -> None:
        """Queue a part again after its worker was lost, whole or in halves; a row that was alone gets an error."""
        losses = part.losses + 1
        if losses < TRIES:
            self._waiting.append(RowRange(part.start, part.rows, losses))
        elif len(part.rows) > 1:
            middle = len(part.rows) // 2
            self._waiting.append(RowRange(part.start, part.rows[:middle], losses))
            self._waiting.append(RowRange(part.start + middle, part.rows[middle:], losses))
        else:
            fault = EngineError(f"the worker was lost {losses} times while it judged this row; check the row's images")
            self._store(part.start, [self.work.unanswered(part.rows[0], fault)])

    def finished(self) -> Iterator[ResultT]:
        """Take the results that are known, in the order of the rows, up to the first one that is missing."""
        while self._taken in self._results:
            result = self._results.pop(self._taken)
            self._taken += 1
            yield result
        if self._taken == self._read:
            self._read_part()  # so that the end of the rows is known even if no worker is free

    def _read_part(self) -> None:
        """Read the next part, unless too many rows are in memory."""
        if self._at_end or self._read - self._taken >= self._ahead or self._bytes >= self._bytes_ahead:
            return
        rows = list(self._next_rows())
        self._at_end = not rows
        if rows:
            self._waiting.append(RowRange(self._read, rows))
            self._read += len(rows)

    def _next_rows(self) -> Iterator[RowT]:
        """The rows of the next part: at most `chunk`, and none after they have its share of the bytes."""
        end = self._bytes + self._part_bytes
        for number, row in enumerate(islice(self._rows, self._chunk), self._read):
            portable = self.work.portable(row)
            self._sizes[number] = size = len(pickle.dumps(portable, pickle.HIGHEST_PROTOCOL))
            self._bytes += size
            yield portable
            if self._bytes >= end:
                return

    def _store(self, start: int, results: Sequence[ResultT]) -> None:
        for number, result in enumerate(results, start):
            self._results[number] = result
            self._bytes -= self._sizes.pop(number)
