"""ToxicChat (arXiv 2310.17389): user messages to a chat model, labelled by people or by a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import RecordContext, SourceAdapter, label_of, sample_of, text_field

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import GoldLabel, Sample

_TOXICITY: dict[object, GoldLabel] = {"1": "harmful", 1: "harmful", "0": "unharmful", 0: "unharmful"}


def to_sample(record: Record, context: RecordContext) -> Sample:
    """`toxicity` labels the user's input; `meta.human_annotation` says whether people did so (True or False)."""
    by_people = record.get("human_annotation")
    return sample_of(
        context,
        text_field(record, "user_input"),
        request=label_of(record, "toxicity", _TOXICITY),
        human_annotation=None if by_people is None else str(by_people),
    )


ADAPTER = SourceAdapter(
    name="toxicchat",
    files=("data/0124/toxic-chat_annotation_train.csv",),
    to_sample=to_sample,
    licence="CC-BY-NC-4.0",
    origin="hub lmsys/toxic-chat, config toxicchat0124",
    hub="lmsys/toxic-chat",
)
