"""Read answers of other programs, for `score`: the authors' `generated_predictions.jsonl`, or answers by id.

A row with a missing answer or one that is not a text counts as one error and lowers the coverage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError, InputError
from guardreasoner_vl.evaluation.benchmarks.released import gold_labels
from guardreasoner_vl.evaluation.rules import ScoredAnswer
from guardreasoner_vl.protocol.messages import parse_released_input
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.sources.records import NotASampleError, read_records
from guardreasoner_vl.sources.skipped import SkippedRows

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.sources.records import Record, SourceRow
    from guardreasoner_vl.types import GoldLabel, Sample, Target

ANSWER, LABEL = "predict", "label"
NO_ANSWER = f"no text in {ANSWER!r}"
OTHER_TASK = f"{LABEL!r} is about refusals: refusal detection is another task and is not scored"
WHICH_TARGET = f"{LABEL!r} is a bare word: give --target request or --target response"
_REFUSALS = ("refusal", "compliance")
_BARE = ("harmful", "unharmful", "harmless")
_NO_ANSWER_TEXT = ""


@dataclass
class ExternalPredictions:
    """The rows to score. They include the `unanswered` rows, which count as wrong, but not the `skipped` ones."""

    rows: list[ScoredAnswer] = field(default_factory=list)
    unanswered: SkippedRows = field(default_factory=SkippedRows)
    skipped: SkippedRows = field(default_factory=SkippedRows)


def read_external_predictions(
    path: Path, gold: Path | None = None, target: Target | None = None
) -> ExternalPredictions:
    """Read rows `{prompt, label, predict}`, or, with a `gold` file of samples, rows `{id, predict}`.

    `target` is the part that a label of a single word judges. Rows without a label are skipped. Raises `DataError` if
    no row remains, or if the ids of the answers and of the gold file differ.
    """
    stored = ExternalPredictions()
    if gold is None:
        for row in read_records(path):
            _add_labelled(stored, row, target)
    else:
        _add_by_id(stored, path, gold)
    if not stored.rows:
        raise DataError(
            f"{path}: no row to score (skipped: {stored.skipped.reasons}); give rows with prompt, label, {ANSWER}"
        )
    return stored


def _add_labelled(stored: ExternalPredictions, row: SourceRow, target: Target | None) -> None:
    try:
        record = row.record
        if ANSWER not in record and LABEL not in record:
            raise NotASampleError(f"neither {LABEL!r} nor {ANSWER!r}")
        request, response = _labels_of_record(record, target)
    except NotASampleError as error:
        stored.skipped.add(str(error), row.place)
        return
    text = _stored_answer(stored, record, row.place)
    stored.rows.append(ScoredAnswer(text, request, response, _has_response(record, response is not None)))


def _labels_of_record(record: Record, target: Target | None) -> tuple[GoldLabel | None, GoldLabel | None]:
    """The gold labels of request and response. Raises `NotASampleError` if there is none."""
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


def _add_by_id(stored: ExternalPredictions, path: Path, gold: Path) -> None:
    """Add answers by id. Raises `DataError` if the files' ids differ by more than their unreadable rows explain."""
    unread = SkippedRows()
    truths = {sample.id: sample for sample in read_samples(gold, unread)}
    answered: set[str] = set()
    unknown, nameless = 0, 0
    for row in read_records(path):
        try:
            record = row.record
            key = record.get("id")
            if not isinstance(key, str):
                raise NotASampleError("no text in 'id'")
        except NotASampleError as error:
            stored.skipped.add(str(error), row.place)
            nameless += 1
            continue
        if key in answered:
            stored.skipped.add("repeated id", row.place)
        elif key in truths:
            answered.add(key)
            stored.rows.append(_against(truths[key], _stored_answer(stored, record, row.place)))
        else:
            unknown += 1
    missing = [sample for key, sample in truths.items() if key not in answered]
    if unknown > unread.total or len(missing) > nameless:
        raise DataError(
            f"{path}: {unknown:,} answers are for rows missing from {gold}, and {len(missing):,} of its rows have no "
            "answer; give the file that was judged"
        )
    stored.skipped.merge(unread)
    for sample in missing:
        stored.unanswered.add("its answer could not be read", sample.id)
        stored.rows.append(_against(sample, _NO_ANSWER_TEXT))


def _stored_answer(stored: ExternalPredictions, record: Record, place: str) -> str:
    answer = record.get(ANSWER)
    if isinstance(answer, str) and answer.strip():
        return answer
    stored.unanswered.add(NO_ANSWER, place)
    return _NO_ANSWER_TEXT


def _has_response(record: Record, labelled: bool) -> bool:
    """Whether there was a response to judge: by the prompt if it parses, else by the label."""
    try:
        return parse_released_input(str(record.get("prompt") or "")).has_response
    except InputError:
        return labelled


def _against(sample: Sample, answer: str) -> ScoredAnswer:
    return ScoredAnswer(answer, sample.request_label, sample.response_label, sample.has_response)
