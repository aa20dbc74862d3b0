"""UnsafeBench (arXiv 2405.03486): images alone, real and generated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import Adapter, Place, label_of, sample_of
from guardreasoner_vl.sources.records import unpack_image

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import GoldLabel, Sample

_WORDS: dict[object, GoldLabel] = {"Safe": "unharmful", "Unsafe": "harmful"}


def to_sample(record: Record, place: Place) -> Sample:
    """The image stands in the record; the set's `text`, from which it was found or drawn, is not part of it."""
    label = label_of(record, "safety_label", _WORDS)
    image = unpack_image(record.get("image"), place.unpacked)
    return sample_of(place, images=(image,), request=label, category=record.get("category"))


ADAPTER = Adapter(
    name="unsafebench",
    files=("data/train-*.parquet",),
    to_sample=to_sample,
    licence="research only",
    origin="hub yiting/UnsafeBench",
    hub="yiting/UnsafeBench",
    gated=True,
)
