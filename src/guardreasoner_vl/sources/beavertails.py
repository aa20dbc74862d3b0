"""BeaverTails (arXiv 2307.04657): answers, each labelled in the context of its prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import RecordContext, SourceAdapter, label_of, sample_of, text_field

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import GoldLabel, Sample

_SAFE: dict[object, GoldLabel] = {True: "unharmful", False: "harmful"}
_LICENCE = "CC-BY-NC-4.0"
_HUB = "PKU-Alignment/BeaverTails"


def to_sample(record: Record, context: RecordContext) -> Sample:
    """Only the response is labelled; the category is the first one that is marked."""
    categories = record.get("category")
    marked = [name for name, on in categories.items() if on] if isinstance(categories, dict) else []
    return sample_of(
        context,
        text_field(record, "prompt"),
        text_field(record, "response"),
        answered=label_of(record, "is_safe", _SAFE),
        category=marked[0] if marked else None,
    )


_SMALL = ("round0/30k/train.jsonl.gz", "data/30k_train*.parquet")
ADAPTER = SourceAdapter(
    name="beavertails",
    files=("round0/330k/train.jsonl.xz", "round0/330k/train.jsonl.gz", "data/330k_train*.parquet", *_SMALL),
    to_sample=to_sample,
    licence=_LICENCE,
    origin=f"hub {_HUB}",
    hub=_HUB,
)
ADAPTER_30K = SourceAdapter(
    name="beavertails-30k",
    files=_SMALL,
    to_sample=to_sample,
    licence=_LICENCE,
    origin=f"hub {_HUB}, split 30k_train",
    hub=_HUB,
)
"""The smaller split (27,186 rows), the one in the paper's corpus."""
