"""Synthesis by OpenAI's Batch API, at half the price: a file of requests to upload, a file of results to read.

Writing and reading alternate until no row remains: a rejected answer is asked for again in the next file, and a row
without labels gets its reasoning in the file after its votes. Results pass the same gates as online answers and are
appended to the same DIR/reasoning.jsonl.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, islice
from typing import TYPE_CHECKING, BinaryIO

from guardreasoner_vl.corpus.attempts import REASONING, AttemptIndex, AttemptLog
from guardreasoner_vl.corpus.progress import SynthesisProgress, count_progress, pending
from guardreasoner_vl.corpus.store import ROWS, read_info
from guardreasoner_vl.corpus.synthesis_policy import SynthesisPolicy
from guardreasoner_vl.errors import DataError, GuardError, InputError
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.storage.lock import locked_folder
from guardreasoner_vl.teachers.base import TeacherAnswer
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
class WrittenRequests:
    """The request files, the number of requests, and the rows that cannot be asked about, with reasons."""

    files: tuple[Path, ...]
    requests: int
    skipped: SkippedRows


@dataclass(frozen=True)
class ReadResults:
    """The number of answers read, the lines ignored with reasons, and the progress of the corpus."""

    answers: int
    ignored: SkippedRows
    progress: SynthesisProgress


def write_batch_requests(
    corpus_dir: Path, target: Path, chat: Chat, *, attempts: int = 3, votes: int = 3
) -> WrittenRequests:
    """Write one request per row that needs reasoning, or one per missing vote. Raises `DataError`."""
    read_info(corpus_dir)
    policy, skipped = SynthesisPolicy(chat.model, attempts, votes), SkippedRows()
    index = AttemptIndex.read(corpus_dir / REASONING)
    with RequestFiles(target) as files:
        for sample in pending(corpus_dir / ROWS, index):
            terminal_attempt = policy.terminal_attempt(sample, index.state(sample.id))
            if terminal_attempt:
                skipped.add(terminal_attempt.reason or "", sample.id)
                continue
            try:
                for line in _request_lines(sample, index, policy, chat):
                    files.add(line)
            except InputError as error:
                skipped.add(error.code, sample.id)
    return WrittenRequests(tuple(files.paths), files.requests, skipped)


def read_results(
    corpus_dir: Path,
    results: Sequence[Path],
    model: str,
    *,
    attempts: int = 3,
    votes: int = 3,
    price: Price | None = None,
) -> ReadResults:
    """Pass results through the gates, in the rows' order. `price` is the online price. Raises `DataError`."""
    ordinary = price_for(model, price, None)
    policy = SynthesisPolicy(model, attempts, votes, ordinary.batched() if ordinary else None)
    read_info(corpus_dir)
    with ExitStack() as stack:
        stack.enter_context(locked_folder(corpus_dir, "synthesize"))
        log = stack.enter_context(AttemptLog(corpus_dir / REASONING))
        reading = _Reading(policy, log, AttemptIndex.read(log.path))
        for path in results:
            reading.add_results(stack.enter_context(_open_results(path)))
        for sample in pending(corpus_dir / ROWS, reading.attempts):
            reading.row(sample)
        return reading.finish()


def _request_lines(sample: Sample, index: AttemptIndex, policy: SynthesisPolicy, chat: Chat) -> Iterator[bytes]:
    state = index.state(sample.id)
    if policy.needs_votes(sample, state):
        body = chat.labelling(sample)
        unused = (name for name in _vote_ids(sample.id) if name not in index.answered)
        for custom_id in islice(unused, policy.votes - len(state.votes)):
            yield request_line(custom_id, body)
    else:
        row = policy.with_majority_labels(sample, state) or sample
        custom_id = _custom_id("reasoning", state.rejections + 1, sample.id)
        yield request_line(custom_id, chat.writing(row, state.complaint))


def _vote_ids(row: str) -> Iterator[str]:
    return (_custom_id("label", number, row) for number in count(1))


def _custom_id(kind: Asked, number: int, row: str) -> str:
    return f"{kind}-{number}/{row}"


@dataclass(frozen=True)
class _ResultLine:
    """The position of a result in a file: results are in any order, rows are processed in their own."""

    kind: Asked
    number: int
    stream: BinaryIO
    offset: int


@dataclass
class _Reading:
    policy: SynthesisPolicy
    log: AttemptLog
    attempts: AttemptIndex
    ignored: SkippedRows = field(default_factory=SkippedRows)
    answers: int = 0
    lines: dict[str, list[_ResultLine]] = field(default_factory=dict)

    def add_results(self, stream: BinaryIO) -> None:
        """Index a file's lines by row; a request that already has an answer is ignored."""
        offset = 0
        for line in stream:
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            result = read_result(line)
            match = _CUSTOM_ID.fullmatch(result.custom_id) if result else None
            if result is None or match is None:
                self.ignored.add(UNKNOWN if result else NO_RESULT)
            elif result.custom_id in self.attempts.answered:
                self.ignored.add(REPEATED)
            else:
                if isinstance(result.outcome, TeacherAnswer):
                    self.attempts.answered.add(result.custom_id)
                kind: Asked = "label" if match[1] == "label" else "reasoning"
                self.lines.setdefault(match[3], []).append(_ResultLine(kind, int(match[2]), stream, start))

    def row(self, sample: Sample) -> None:
        """Record the results of one row: its votes first, then its reasoning."""
        state = self.attempts.state(sample.id)
        for position in sorted(self.lines.pop(sample.id, []), key=lambda line: (line.kind, line.number)):
            position.stream.seek(position.offset)
            result = read_result(position.stream.readline())
            if result is None or state.done or not self._expected(position.kind, sample, state):
                self.ignored.add(UNKNOWN)
            else:
                self._record(self._attempt(position.kind, sample, state, result))
        terminal_attempt = None if state.done else self.policy.terminal_attempt(sample, state)
        if terminal_attempt:
            self._record(terminal_attempt)

    def finish(self) -> ReadResults:
        """Count results of unknown or finished rows as ignored, and give the outcome."""
        for lines in self.lines.values():
            for _ in lines:
                self.ignored.add(UNKNOWN)
        progress = count_progress(self.log.path.with_name(ROWS), self.attempts, self.policy.teacher)
        return ReadResults(self.answers, self.ignored, progress)

    def _expected(self, kind: Asked, sample: Sample, state: RowState) -> bool:
        if self.policy.terminal_attempt(sample, state):
            return False
        return (kind == "label") == self.policy.needs_votes(sample, state)

    def _attempt(self, kind: Asked, sample: Sample, state: RowState, result: Result) -> Attempt:
        outcome = result.outcome
        if isinstance(outcome, GuardError):
            return self.policy.fault(sample, kind, outcome, result.custom_id)
        self.answers += 1
        if kind == "label":
            return self.policy.vote(sample, outcome, result.custom_id)
        return self.policy.reasoning(sample, state, outcome, result.custom_id)

    def _record(self, attempt: Attempt) -> None:
        self.log.add(attempt)
        self.attempts.add(attempt)


def _open_results(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file of batch results") from error
