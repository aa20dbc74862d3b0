"""WildGuardTrain, of WildGuard (arXiv 2406.18495): prompts and answers, each labelled or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import (
    Adapter,
    Place,
    label_of,
    sample_of,
    text_of,
    text_or_none,
)
from guardreasoner_vl.sources.records import NotASampleError

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import GoldLabel, Sample

_WORDS: dict[object, GoldLabel] = {"harmful": "harmful", "unharmful": "unharmful"}


def to_sample(record: Record, place: Place) -> Sample:
    """A null label means that people did not agree, or that nobody was asked; a row without any is none."""
    request, answered = (
        None if record.get(name) is None else label_of(record, name, _WORDS)
        for name in ("prompt_harm_label", "response_harm_label")
    )
    if request is None and answered is None:
        raise NotASampleError("no label")
    return sample_of(
        place,
        text_of(record, "prompt"),
        text_of(record, "response") if answered else text_or_none(record, "response"),
        request=request,
        answered=answered,
        category=record.get("subcategory"),
        adversarial=record.get("adversarial"),
    )


ADAPTER = Adapter(
    name="wildguardtrain",
    files=("train/wildguard_train.parquet",),
    to_sample=to_sample,
    licence="ODC-BY",
    origin="hub allenai/wildguardmix, config wildguardtrain",
    hub="allenai/wildguardmix",
    gated=True,
)
