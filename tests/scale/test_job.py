"""The rows of a job shared by many workers: order, memory, and what becomes of lost parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from guardreasoner_vl.scale.job import TRIES, RowQueue, RowRange

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guardreasoner_vl.errors import GuardError
    from guardreasoner_vl.guard import Guard


@dataclass
class Squaring:
    """Squares numbers. None stands for a number that got no answer."""

    sent: list[int] = field(default_factory=list)

    def __call__(self, guard: Guard, rows: Sequence[int]) -> list[int | None]:
        raise AssertionError("a worker's work, not the job's")

    def portable(self, row: int) -> int:
        self.sent.append(row)
        return row

    def unanswered(self, row: int, error: GuardError) -> int | None:
        assert "the worker was lost" in str(error)
        return None

    def is_unanswered(self, result: int | None) -> bool:
        return result is None


def job(count: int, chunk: int, ahead: int, bytes_ahead: int = 1_000_000) -> RowQueue[int, int | None]:
    return RowQueue(Squaring(), range(count), chunk, ahead, bytes_ahead)


def squares(part: RowRange[int]) -> list[int | None]:
    return [row * row for row in part.rows]


def next_of(rows: RowQueue[int, int | None]) -> RowRange[int]:
    part = rows.next_part()
    assert part is not None
    return part


def test_results_come_in_the_order_of_the_rows_whichever_part_is_first() -> None:
    rows = job(5, 2, 6)
    first, second, third = next_of(rows), next_of(rows), next_of(rows)
    assert (first.rows, second.rows, third.rows) == ([0, 1], [2, 3], [4])
    assert rows.next_part() is None
    rows.add(third, [16])
    rows.add(second, [4, 9])
    assert list(rows.finished()) == []
    rows.add(first, [0, 1])
    assert not rows.done
    assert list(rows.finished()) == [0, 1, 4, 9, 16]
    assert rows.done


def test_rows_are_read_as_results_are_taken() -> None:
    rows = job(100, 2, 4)
    first, second = next_of(rows), next_of(rows)
    assert rows.next_part() is None
    rows.add(second, squares(second))
    assert (list(rows.finished()), rows.next_part()) == ([], None)
    rows.add(first, squares(first))
    results = rows.finished()
    assert [next(results) for _ in range(2)] == [0, 1]
    assert next_of(rows).rows == [4, 5]
    work = rows.work
    assert isinstance(work, Squaring)
    assert work.sent == [0, 1, 2, 3, 4, 5]


def test_large_rows_are_read_as_others_get_their_results() -> None:
    """Each row has a little more than 1,000 bytes; 6,000 bytes for 6 parts are one row a part."""
    large = 1 << 8_000
    rows = RowQueue(Squaring(), [large + number for number in range(9)], 4, 24, 6_000)
    parts = [next_of(rows) for _ in range(6)]
    assert [part.rows for part in parts] == [[large + number] for number in range(6)]
    assert rows.next_part() is None
    rows.add(parts[3], squares(parts[3]))
    assert list(rows.finished()) == []
    assert next_of(rows).rows == [large + 6]
    assert rows.next_part() is None
    rows.lose(parts[4])
    rows.lose(next_of(rows))
    assert next_of(rows).rows == [large + 7]


def test_a_job_without_rows_is_done() -> None:
    rows = job(0, 2, 4)
    assert rows.next_part() is None
    assert rows.done


def lost_until_known(rows: RowQueue[int, int | None], deadly: int) -> Iterator[RowRange[int]]:
    """Judge all rows with workers that are lost at one of the numbers; yields the parts that are lost."""
    while part := rows.next_part():
        if deadly in part.rows:
            rows.lose(part)
            yield part
        else:
            rows.add(part, squares(part))


def test_the_one_row_that_ends_its_worker_is_the_only_one_without_an_answer() -> None:
    rows = job(8, 8, 8)
    assert [part.rows for part in lost_until_known(rows, 5)] == [
        *[list(range(8))] * TRIES,
        [4, 5, 6, 7],
        [4, 5],
        [5],
    ]
    assert list(rows.finished()) == [0, 1, 4, 9, 16, None, 36, 49]
    assert rows.done


def test_a_part_without_any_answer_is_tried_again_once() -> None:
    rows = job(3, 3, 3)
    assert not rows.add(next_of(rows), [None, None, None])
    assert list(rows.finished()) == []
    assert rows.add(next_of(rows), [None, None, None])
    assert list(rows.finished()) == [None, None, None]
    three = job(3, 3, 3)
    assert three.add(next_of(three), [None, 1, None])


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 4), st.integers(1, 300), st.data())
def test_every_row_has_one_result_whatever_is_lost(
    count: int, chunk: int, workers: int, bytes_ahead: int, data: st.DataObject
) -> None:
    rows = job(count, chunk, 3 * workers * chunk, bytes_ahead)
    busy: list[RowRange[int]] = []
    taken: list[int | None] = []
    while not rows.done:
        while len(busy) < workers and (part := rows.next_part()):
            busy.append(part)
        taken += rows.finished()
        if busy:
            part = busy.pop(data.draw(st.integers(0, len(busy) - 1)))
            if data.draw(st.integers(0, 3)):
                rows.add(part, squares(part))
            else:
                rows.lose(part)
    assert len(taken) == count
    assert all(result in (None, row * row) for row, result in enumerate(taken))
