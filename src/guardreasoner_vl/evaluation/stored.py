"""Answers that other programs stored, for `score`: the authors' `generated_predictions.jsonl`, or answers by id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError, GuardError, InputError
from guardreasoner_vl.evaluation.benchmarks.released import gold_labels
from guardreasoner_vl.evaluation.rules import Answered
from guardreasoner_vl.protocol.messages import parse_released_input
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.sources.records import read_records
from guardreasoner_vl.sources.set_aside import SetAside

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import Sample

ANSWER = "predict"


def read_stored(path: Path, gold: Path | None = None) -> tuple[list[Answered], SetAside]:
    """Rows `{prompt, label, predict}`, or with a gold file of samples `{id, predict}`.

    Rows without an answer or a label are set aside. Raises `DataError` if nothing is left, or if the gold
    file's rows and the answers' are not the same ones.
    """
    set_aside = SetAside()
    truths = None if gold is None else {sample.id: sample for sample in read_samples(gold)}
    rows: list[Answered] = []
    seen: set[str] = set()
    strange = 0
    for record in read_records(path):
        answer = record.get(ANSWER)
        if not isinstance(answer, str):
            set_aside.add(f"no {ANSWER!r}")
            continue
        if truths is None:
            _add(rows, record, answer, set_aside)
            continue
        key = record.get("id")
        if key in seen:
            set_aside.add("its id stands there already")
        elif isinstance(key, str) and key in truths:
            seen.add(key)
            rows.append(_against(truths[key], answer))
        else:
            strange += 1
    if truths is not None and (strange or len(seen) < len(truths)):
        raise DataError(
            f"{path}: {strange:,} answers to rows that {gold} lacks, {len(truths) - len(seen):,} of its rows without "
            "an answer; give the file that was judged"
        )
    if not rows:
        raise DataError(
            f"{path}: no row to score (set aside: {set_aside.reasons}); give rows with prompt, label, {ANSWER}"
        )
    return rows, set_aside


def _add(rows: list[Answered], record: Record, answer: str, set_aside: SetAside) -> None:
    try:
        request, response = gold_labels(str(record.get("label") or ""))
    except GuardError as error:
        set_aside.add(str(error))
        return
    if request is None and response is None:
        set_aside.add("no label")
        return
    rows.append(Answered(answer, request, response, _answered(record, response is not None)))


def _answered(record: Record, labelled: bool) -> bool:
    """Whether there was a response to judge: what was asked tells, else the label."""
    try:
        return parse_released_input(str(record.get("prompt") or "")).has_response
    except InputError:
        return labelled


def _against(sample: Sample, answer: str) -> Answered:
    return Answered(answer, sample.request_label, sample.response_label, bool((sample.response or "").strip()))
