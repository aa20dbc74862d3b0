"""The test set as the paper's authors released it: hub data set `yueliu1999/GuardReasoner-VLTest`.

Text sets are lists of `{instruction, input, output}`, image sets of `{messages, images}`. The gold labels are in
`output` or in the assistant's message, as a single word or after `Request:` and `Response:`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.evaluation.benchmarks.base import FileLayout
from guardreasoner_vl.protocol.messages import parse_released_input
from guardreasoner_vl.sources.adapters import RecordContext, text_field
from guardreasoner_vl.sources.conversations import (
    Conversation,
    check_marks,
    conversation_of,
    gold_label,
    images_of,
)
from guardreasoner_vl.sources.records import NotASampleError
from guardreasoner_vl.types import GoldLabel, Sample

if TYPE_CHECKING:
    from guardreasoner_vl.evaluation.benchmarks.base import Judged
    from guardreasoner_vl.sources.adapters import ToSample
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import Modality, Target


def released(file: str, judged: Judged, modality: Modality) -> FileLayout:
    """The layout of `test/FILE.json`."""
    return FileLayout(f"test/{file}.json", _to_sample(judged, modality))


def gold_labels(text: str, *, bare: Target | None = None) -> tuple[GoldLabel | None, GoldLabel | None]:
    """Request and response labels in the form `Request: ...`; a single word is the label of the target `bare`.

    Raises `NotASampleError`.
    """
    return gold_label(text, "request", bare=bare == "request"), gold_label(text, "response", bare=bare == "response")


def _to_sample(judged: Judged, modality: Modality) -> ToSample:
    def to_sample(record: Record, context: RecordContext) -> Sample:
        spoken = _spoken(record, context)
        check_marks(spoken)
        try:
            exchange = parse_released_input(spoken.asked, spoken.images)
        except InputError as error:
            raise NotASampleError("not the released layout") from error
        gold = spoken.answered
        return Sample(
            id=context.id,
            source=context.name,
            split="test",
            modality=modality,
            prompt=exchange.prompt or "",
            images=spoken.images,
            response=exchange.response,
            request_label=None if judged == "response" else gold_label(gold, "request", bare=judged == "prompt"),
            response_label=None if judged == "prompt" else gold_label(gold, "response", bare=judged == "response"),
        )

    return to_sample


def _spoken(record: Record, context: RecordContext) -> Conversation:
    """The user's message, the text with the labels, and the image paths."""
    if record.get("messages") is not None:
        return conversation_of(record, context, "messages", "role", "content")
    output = record.get("output")
    answer = output if isinstance(output, str) else ""
    return Conversation(text_field(record, "input"), answer, images_of(record, context))
