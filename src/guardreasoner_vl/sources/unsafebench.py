"""UnsafeBench (arXiv 2405.03486): images alone, real and generated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import RecordContext, SourceAdapter, label_of, sample_of
from guardreasoner_vl.sources.records import unpack_image

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import GoldLabel, Sample

_WORDS: dict[object, GoldLabel] = {"Safe": "unharmful", "Unsafe": "harmful"}


def to_sample(record: Record, context: RecordContext) -> Sample:
    """The image is embedded in the record; the set's `text`, a search query or generation prompt, is not used."""
    label = label_of(record, "safety_label", _WORDS)
    image = unpack_image(record.get("image"), context.unpacked)
    return sample_of(context, images=(image,), request=label, category=record.get("category"))


ADAPTER = SourceAdapter(
    name="unsafebench",
    files=("data/train-*.parquet",),
    to_sample=to_sample,
    licence="research only",
    origin="hub yiting/UnsafeBench",
    hub="yiting/UnsafeBench",
    gated=True,
)
