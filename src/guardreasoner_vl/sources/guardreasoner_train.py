"""GuardReasonerTrain (arXiv 2501.18492): four text sets with the reasoning that GPT-4o wrote about them.

Records are `{instruction, input, output}`: `input` is the whole user message, `output` the reasoning, then a block
`Answers:` with the lines `Request:`, `Completion:` (whether it was a refusal; not used here) and `Response:`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.protocol import parse_released_input
from guardreasoner_vl.sources.adapters import RecordContext, SourceAdapter, sample_of, text_field
from guardreasoner_vl.sources.conversations import Conversation, check_marks, gold_label, images_of
from guardreasoner_vl.sources.records import NotASampleError, read_records

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guardreasoner_vl.sources.records import Record, SourceRow
    from guardreasoner_vl.types import Sample

_FILE = "_file"
_ANSWERS = re.compile(r"^[ \t]*Answers:[ \t]*$", re.MULTILINE)


def read_named(path: Path) -> Iterator[SourceRow]:
    """The file's rows with the file's name added, which identifies the original data set."""
    return (replace(row, content={**row.content, _FILE: path.stem}) for row in read_records(path))


def to_sample(record: Record, context: RecordContext) -> Sample:
    """The last `Answers:` block holds the labels; a label for a missing request or response is ignored."""
    output = text_field(record, "output")
    blocks = list(_ANSWERS.finditer(output))
    if not blocks:
        raise NotASampleError("no answers in its output")
    spoken = Conversation(text_field(record, "input"), "", images_of(record, context))
    check_marks(spoken)
    try:
        exchange = parse_released_input(spoken.asked)
    except InputError as error:
        raise NotASampleError("not the released layout") from error
    answers = output[blocks[-1].end() :]
    request, answered = gold_label(answers, "request"), gold_label(answers, "response")
    if not exchange.has_prompt:
        request = None
    if not exchange.has_response:
        answered = None
    if request is None and answered is None:
        raise NotASampleError("no label")
    return sample_of(
        context,
        exchange.prompt or "",
        exchange.response,
        images=spoken.images,
        request=request,
        answered=answered,
        reasoning=output[: blocks[-1].start()].strip() or None,
        file=record.get(_FILE),
    )


ADAPTER = SourceAdapter(
    name="guardreasonertrain",
    files=("*Train-R.json",),
    to_sample=to_sample,
    licence="MIT",
    origin="hub yueliu1999/GuardReasonerTrain",
    hub="yueliu1999/GuardReasonerTrain",
    read=read_named,
)
