"""WildGuardTrain (WildGuard, arXiv 2406.18495): prompts and answers, each with or without a label."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import (
    RecordContext,
    SourceAdapter,
    label_of,
    sample_of,
    text_field,
    text_or_none,
)
from guardreasoner_vl.sources.records import NotASampleError

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import GoldLabel, Sample

_WORDS: dict[object, GoldLabel] = {"harmful": "harmful", "unharmful": "unharmful"}


def to_sample(record: Record, context: RecordContext) -> Sample:
    """A null label means no agreement or no annotation; a row without any label is refused."""
    request, answered = (
        None if record.get(name) is None else label_of(record, name, _WORDS)
        for name in ("prompt_harm_label", "response_harm_label")
    )
    if request is None and answered is None:
        raise NotASampleError("no label")
    return sample_of(
        context,
        text_field(record, "prompt"),
        text_field(record, "response") if answered else text_or_none(record, "response"),
        request=request,
        answered=answered,
        category=record.get("subcategory"),
        adversarial=record.get("adversarial"),
    )


ADAPTER = SourceAdapter(
    name="wildguardtrain",
    files=("train/wildguard_train.parquet",),
    to_sample=to_sample,
    licence="ODC-BY",
    origin="hub allenai/wildguardmix, config wildguardtrain",
    hub="allenai/wildguardmix",
    gated=True,
)
