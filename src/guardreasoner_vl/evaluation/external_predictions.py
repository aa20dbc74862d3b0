"""Answers that other programs stored, for `score`: the authors' `generated_predictions.jsonl`, or answers by id.

A row whose answer is missing, or is no text, was not answered: it counts as wrong once and lowers the coverage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError, InputError
from guardreasoner_vl.evaluation.benchmarks.released import gold_labels
from guardreasoner_vl.evaluation.rules import Answered
from guardreasoner_vl.protocol.messages import parse_released_input
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.sources.records import NotASampleError, read_records
from guardreasoner_vl.sources.skipped import SetAside

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.sources.records import Record, Row
    from guardreasoner_vl.types import GoldLabel, Sample, Target

ANSWER, LABEL = "predict", "label"
NO_ANSWER = f"no text in {ANSWER!r}"
OTHER_TASK = f"{LABEL!r} is about refusals: refusal detection is another task, not scored here"
WHICH_TARGET = f"{LABEL!r} is a bare word: say what it judges, --target request or --target response"
_REFUSALS = ("refusal", "compliance")
_BARE = ("harmful", "unharmful", "harmless")
_NO_ANSWER_TEXT = ""


@dataclass
class Stored:
    """Rows to score; `unanswered` are among them, counted as wrong, `set_aside` are not."""

    rows: list[Answered] = field(default_factory=list)
    unanswered: SetAside = field(default_factory=SetAside)
    set_aside: SetAside = field(default_factory=SetAside)


def read_stored(path: Path, gold: Path | None = None, target: Target | None = None) -> Stored:
    """Rows `{prompt, label, predict}`, or with a gold file of samples `{id, predict}`.

    `target` says what a label judges that is a bare word. Rows without a label are set aside. Raises `DataError` if
    nothing is left, or if the gold file's rows and the answers' are not the same ones.
    """
    stored = Stored()
    if gold is None:
        for row in read_records(path):
            _add_labelled(stored, row, target)
    else:
        _add_by_id(stored, path, gold)
    if not stored.rows:
        raise DataError(
            f"{path}: no row to score (set aside: {stored.set_aside.reasons}); give rows with prompt, label, {ANSWER}"
        )
    return stored


def _add_labelled(stored: Stored, row: Row, target: Target | None) -> None:
    try:
        record = row.record
        if ANSWER not in record and LABEL not in record:
            raise NotASampleError(f"neither {LABEL!r} nor {ANSWER!r}")
        request, response = _labels(record, target)
    except NotASampleError as error:
        stored.set_aside.add(str(error), row.place)
        return
    text = _answer(stored, record, row.place)
    stored.rows.append(Answered(text, request, response, _has_response(record, response is not None)))


def _labels(record: Record, target: Target | None) -> tuple[GoldLabel | None, GoldLabel | None]:
    """The truths about request and response. Raises `NotASampleError` if there is none."""
    label = record.get(LABEL)
    if not isinstance(label, str):
        raise NotASampleError(f"no text in {LABEL!r}")
    word = label.strip().lower()
    if word in _REFUSALS:
        raise NotASampleError(OTHER_TASK)
    if word in _BARE and target is None:
        raise NotASampleError(WHICH_TARGET)
    request, response = gold_labels(label, bare=target)
    if request is None and response is None:
        raise NotASampleError("no label")
    return request, response


def _add_by_id(stored: Stored, path: Path, gold: Path) -> None:
    """Raises `DataError` unless the ids of both files agree, except for rows of either file that cannot be read."""
    unread = SetAside()
    truths = {sample.id: sample for sample in read_samples(gold, unread)}
    seen: set[str] = set()
    unknown, nameless = 0, 0
    for row in read_records(path):
        try:
            record = row.record
            key = record.get("id")
            if not isinstance(key, str):
                raise NotASampleError("no text in 'id'")
        except NotASampleError as error:
            stored.set_aside.add(str(error), row.place)
            nameless += 1
            continue
        if key in seen:
            stored.set_aside.add("its id stands there already", row.place)
        elif key in truths:
            seen.add(key)
            stored.rows.append(_against(truths[key], _answer(stored, record, row.place)))
        else:
            unknown += 1
    missing = [sample for key, sample in truths.items() if key not in seen]
    if unknown > unread.total or len(missing) > nameless:
        raise DataError(
            f"{path}: {unknown:,} answers to rows that {gold} lacks, {len(missing):,} of its rows without "
            "an answer; give the file that was judged"
        )
    stored.set_aside.merge(unread)
    for sample in missing:
        stored.unanswered.add("its answer could not be read", sample.id)
        stored.rows.append(_against(sample, _NO_ANSWER_TEXT))


def _answer(stored: Stored, record: Record, place: str) -> str:
    answer = record.get(ANSWER)
    if isinstance(answer, str) and answer.strip():
        return answer
    stored.unanswered.add(NO_ANSWER, place)
    return _NO_ANSWER_TEXT


def _has_response(record: Record, labelled: bool) -> bool:
    """Whether there was a response to judge: what was asked tells, else the label."""
    try:
        return parse_released_input(str(record.get("prompt") or "")).has_response
    except InputError:
        return labelled


def _against(sample: Sample, answer: str) -> Answered:
    return Answered(answer, sample.request_label, sample.response_label, bool((sample.response or "").strip()))
