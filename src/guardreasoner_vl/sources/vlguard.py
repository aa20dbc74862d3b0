"""VLGuard (arXiv 2402.02207): images that are safe or not, and instructions about them.

A safe image has a safe and an unsafe instruction, an unsafe one a single instruction. The images come from
other sets, named by the first folder of their paths: `meta.subset`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import (
    RecordContext,
    SourceAdapter,
    image_of,
    label_of,
    sample_of,
    text_field,
    text_or_none,
)
from guardreasoner_vl.sources.records import NotASampleError

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import GoldLabel, Sample

_SAFE: dict[object, GoldLabel] = {True: "unharmful", False: "harmful"}
_INSTRUCTIONS: dict[str, GoldLabel] = {
    "instruction": "harmful",
    "unsafe_instruction": "harmful",
    "safe_instruction": "unharmful",
}


def to_samples(record: Record, context: RecordContext, images: str = "train") -> list[Sample]:
    """One row for each instruction, with its unlabelled answer; `images` is the images' folder."""
    image = _image_path(record, context, images)
    entries = record.get("instr-resp")
    if not isinstance(record.get("safe"), bool) or not isinstance(entries, list):
        raise NotASampleError("no safety flag or no instruction")
    samples = [
        sample_of(
            context,
            text_field(entry, name),
            text_or_none(entry, "response"),
            images=(image,),
            request=label,
            own_id=f"{context.id}/{name}",
            category=record.get("harmful_category"),
            subcategory=record.get("harmful_subcategory"),
            subset=_subset(record),
        )
        for entry in entries
        if isinstance(entry, dict)
        for name, label in _INSTRUCTIONS.items()
        if entry.get(name)
    ]
    if not samples:
        raise NotASampleError("no safety flag or no instruction")
    return samples


def to_image(record: Record, context: RecordContext) -> Sample:
    """The image alone, labelled by `safe`."""
    return sample_of(
        context,
        images=(_image_path(record, context, "train"),),
        request=label_of(record, "safe", _SAFE),
        category=record.get("harmful_category"),
        subcategory=record.get("harmful_subcategory"),
        subset=_subset(record),
    )


def _image_path(record: Record, context: RecordContext, images: str) -> str:
    name = str(record.get("image"))
    return image_of(context, f"{images}/{name}", name)


def _subset(record: Record) -> str | None:
    folders = PurePath(str(record.get("image"))).parts[:-1]
    return folders[0] if folders else None


ADAPTER = SourceAdapter(
    name="vlguard",
    files=("train.json",),
    to_sample=to_samples,
    licence="research only",
    origin="hub ys-zong/VLGuard (train.json, and train.zip unpacked beside it)",
    hub="ys-zong/VLGuard",
    gated=True,
)
IMAGES_ADAPTER = replace(ADAPTER, name="vlguard-images", to_sample=to_image)
