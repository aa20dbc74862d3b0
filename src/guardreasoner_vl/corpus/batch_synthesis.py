"""Synthesis by OpenAI's Batch API, at half the price: a file of requests to upload, a file of results to read.

Writing and reading take turns until no row is left: a rejected trace is asked again in the next file, and a row
without any label gets its reasoning in the file after the one with its votes. Results meet the same gates as
online answers and end in the same DIR/reasoning.jsonl.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, islice
from typing import TYPE_CHECKING, BinaryIO

from guardreasoner_vl.corpus.attempts import REASONING, AttemptLog, Ledger
from guardreasoner_vl.corpus.progress import Standing, pending, standing
from guardreasoner_vl.corpus.store import ROWS, read_info
from guardreasoner_vl.corpus.synthesis_policy import Terms
from guardreasoner_vl.errors import DataError, GuardError, InputError
from guardreasoner_vl.sources.skipped import SetAside
from guardreasoner_vl.storage.lock import locked_folder
from guardreasoner_vl.teachers.base import Answered
from guardreasoner_vl.teachers.batch_api import RequestFiles, Result, read_result, request_line
from guardreasoner_vl.teachers.budget import price_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from guardreasoner_vl.corpus.attempts import Asked, Attempt, RowState
    from guardreasoner_vl.teachers.budget import Price
    from guardreasoner_vl.teachers.openai import Chat
    from guardreasoner_vl.types import Sample

UNKNOWN, REPEATED, NO_RESULT = "unknown custom_id", "repeated custom_id", "not a result"
_CUSTOM_ID = re.compile(r"(label|reasoning)-(\d{1,9})/(.+)", re.DOTALL)


@dataclass(frozen=True)
class Written:
    """The files of requests; rows that cannot be asked about, with the reasons."""

    files: tuple[Path, ...]
    requests: int
    skipped: SetAside


@dataclass(frozen=True)
class Returned:
    """What results brought: `answers` read, lines ignored with the reasons, and where the corpus stands now."""

    answers: int
    ignored: SetAside
    standing: Standing


def write_requests(corpus_dir: Path, target: Path, chat: Chat, *, attempts: int = 3, votes: int = 3) -> Written:
    """Write a request for every row that still needs reasoning, or one for each vote it lacks. Raises `DataError`."""
    read_info(corpus_dir)
    terms, skipped = Terms(chat.model, attempts, votes), SetAside()
    ledger = Ledger.read(corpus_dir / REASONING)
    with RequestFiles(target) as files:
        for sample in pending(corpus_dir / ROWS, ledger):
            hopeless = terms.hopeless(sample, ledger.state(sample.id))
            if hopeless:
                skipped.add(hopeless.reason or "", sample.id)
                continue
            try:
                for line in _lines(sample, ledger, terms, chat):
                    files.add(line)
            except InputError as error:
                skipped.add(error.code, sample.id)
    return Written(tuple(files.paths), files.requests, skipped)


def read_results(
    corpus_dir: Path,
    results: Sequence[Path],
    model: str,
    *,
    attempts: int = 3,
    votes: int = 3,
    price: Price | None = None,
) -> Returned:
    """Put the results through the gates, in the rows' order. `price` is the ordinary one. Raises `DataError`."""
    ordinary = price_for(model, price, None)
    terms = Terms(model, attempts, votes, ordinary.batched() if ordinary else None)
    read_info(corpus_dir)
    with ExitStack() as stack:
        stack.enter_context(locked_folder(corpus_dir, "synthesize"))
        log = stack.enter_context(AttemptLog(corpus_dir / REASONING))
        reading = _Reading(terms, log, Ledger.read(log.path))
        for path in results:
            reading.index(stack.enter_context(_opened(path)))
        for sample in pending(corpus_dir / ROWS, reading.ledger):
            reading.row(sample)
        return reading.finish()


def _lines(sample: Sample, ledger: Ledger, terms: Terms, chat: Chat) -> Iterator[bytes]:
    state = ledger.state(sample.id)
    if terms.lacks_votes(sample, state):
        body = chat.labelling(sample)
        unused = (name for name in _vote_ids(sample.id) if name not in ledger.answered)
        for custom_id in islice(unused, terms.votes - len(state.votes)):
            yield request_line(custom_id, body)
    else:
        row = terms.labelled(sample, state) or sample
        custom_id = _custom_id("reasoning", state.rejections + 1, sample.id)
        yield request_line(custom_id, chat.writing(row, state.complaint))


def _vote_ids(row: str) -> Iterator[str]:
    return (_custom_id("label", number, row) for number in count(1))


def _custom_id(asked: Asked, number: int, row: str) -> str:
    return f"{asked}-{number}/{row}"


@dataclass(frozen=True)
class _Place:
    """Where a result stands; results come in any order, rows in their own."""

    asked: Asked
    number: int
    stream: BinaryIO
    offset: int


@dataclass
class _Reading:
    terms: Terms
    log: AttemptLog
    ledger: Ledger
    ignored: SetAside = field(default_factory=SetAside)
    answers: int = 0
    places: dict[str, list[_Place]] = field(default_factory=dict)

    def index(self, stream: BinaryIO) -> None:
        """Note what each line is about; an answer that is known already is ignored."""
        offset = 0
        for line in stream:
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            result = read_result(line)
            named = _CUSTOM_ID.fullmatch(result.custom_id) if result else None
            if result is None or named is None:
                self.ignored.add(UNKNOWN if result else NO_RESULT)
            elif result.custom_id in self.ledger.answered:
                self.ignored.add(REPEATED)
            else:
                if isinstance(result.outcome, Answered):
                    self.ledger.answered.add(result.custom_id)
                place = _Place("label" if named[1] == "label" else "reasoning", int(named[2]), stream, start)
                self.places.setdefault(named[3], []).append(place)

    def row(self, sample: Sample) -> None:
        """Record what came back about one row: its votes first, then its reasoning."""
        state = self.ledger.state(sample.id)
        for place in sorted(self.places.pop(sample.id, []), key=lambda place: (place.asked, place.number)):
            place.stream.seek(place.offset)
            result = read_result(place.stream.readline())
            if result is None or state.done or not self._expected(place.asked, sample, state):
                self.ignored.add(UNKNOWN)
            else:
                self._record(self._attempt(place.asked, sample, state, result))
        hopeless = None if state.done else self.terms.hopeless(sample, state)
        if hopeless:
            self._record(hopeless)

    def finish(self) -> Returned:
        """Count the results about rows that are not there, or need nothing."""
        for places in self.places.values():
            for _ in places:
                self.ignored.add(UNKNOWN)
        return Returned(self.answers, self.ignored, standing(self.log.path.with_name(ROWS), self.ledger))

    def _expected(self, asked: Asked, sample: Sample, state: RowState) -> bool:
        if self.terms.hopeless(sample, state):
            return False
        return (asked == "label") == self.terms.lacks_votes(sample, state)

    def _attempt(self, asked: Asked, sample: Sample, state: RowState, result: Result) -> Attempt:
        outcome = result.outcome
        if isinstance(outcome, GuardError):
            return self.terms.fault(sample, asked, outcome, result.custom_id)
        self.answers += 1
        if asked == "label":
            return self.terms.vote(sample, outcome, result.custom_id)
        return self.terms.reasoning(sample, state, outcome, result.custom_id)

    def _record(self, attempt: Attempt) -> None:
        self.log.add(attempt)
        self.ledger.add(attempt)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file of batch results") from error
