"""SPA-VL (arXiv 2406.12030): questions about images with a preferred and a rejected answer.

A preference is not a label: both answers may be harmless, or neither. Rows have no labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import RecordContext, SourceAdapter, sample_of, text_field
from guardreasoner_vl.sources.records import unpack_image

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import Sample


def to_samples(record: Record, context: RecordContext) -> list[Sample]:
    """One row for each of the two answers."""
    question = text_field(record, "question")
    answers = {name: text_field(record, name) for name in ("chosen", "rejected")}
    image = unpack_image(record.get("image"), context.unpacked)
    return [
        sample_of(
            context,
            question,
            answer,
            images=(image,),
            own_id=f"{context.id}-{name}",
            category=record.get("class1"),
            class2=record.get("class2"),
            class3=record.get("class3"),
            answer=name,
        )
        for name, answer in answers.items()
    ]


ADAPTER = SourceAdapter(
    name="spa-vl",
    files=("data/train-*.parquet",),
    to_sample=to_samples,
    licence="CC-BY-4.0",
    origin="hub sqrti/SPA-VL",
    hub="sqrti/SPA-VL",
)
