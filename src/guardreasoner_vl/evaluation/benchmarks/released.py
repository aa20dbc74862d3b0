"""The test set as the paper's authors released it: hub data set `yueliu1999/GuardReasoner-VLTest`.

Text sets are lists of `{instruction, input, output}`, image sets of `{messages, images}`; the gold labels
stand in `output`, or in the assistant's message, bare or behind `Request:` and `Response:`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.evaluation.benchmarks.base import Layout
from guardreasoner_vl.protocol.messages import parse_released_input
from guardreasoner_vl.sources.adapters import Place, text_of
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


def released(file: str, judged: Judged, modality: Modality) -> Layout:
    """The layout of `test/FILE.json`."""
    return Layout(f"test/{file}.json", _to_sample(judged, modality))


def gold_labels(text: str, *, bare: Target | None = None) -> tuple[GoldLabel | None, GoldLabel | None]:
    """Request and response labels of the authors' form `Request: ...`; a word alone is about `bare`.

    Raises `NotASampleError`.
    """
    return gold_label(text, "request", bare=bare == "request"), gold_label(text, "response", bare=bare == "response")


def _to_sample(judged: Judged, modality: Modality) -> ToSample:
    def to_sample(record: Record, place: Place) -> Sample:
        spoken = _spoken(record, place)
        check_marks(spoken)
        try:
            exchange = parse_released_input(spoken.asked, spoken.images)
        except InputError as error:
            raise NotASampleError("not the released layout") from error
        gold = spoken.answered
        return Sample(
            id=place.id,
            source=place.name,
            split="test",
            modality=modality,
            prompt=exchange.prompt or "",
            images=spoken.images,
            response=exchange.response,
            request_label=None if judged == "response" else gold_label(gold, "request", bare=judged == "prompt"),
            response_label=None if judged == "prompt" else gold_label(gold, "response", bare=judged == "response"),
        )

    return to_sample


def _spoken(record: Record, place: Place) -> Conversation:
    """What was asked, the text that holds the labels, and the images' paths."""
    if record.get("messages") is not None:
        return conversation_of(record, place, "messages", "role", "content")
    output = record.get("output")
    answer = output if isinstance(output, str) else ""
    return Conversation(text_of(record, "input"), answer, images_of(record, place))
