"""Labels of rows that have none, from labelled rows with the same content."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from guardreasoner_vl.types import GoldLabel, Sample

Content = tuple[str, str, int]
"""Prompt and response, normalised, and the number of images: packed anew, images have other bytes."""


@dataclass(frozen=True)
class KnownLabels:
    """Request and response labels by content; contents with contradicting labels are not among them."""

    labels: dict[Content, tuple[GoldLabel | None, GoldLabel | None]]

    def applied(self, sample: Sample) -> Sample:
        """The sample with the labels it lacks, and where they come from."""
        found = self.labels.get(content(sample))
        if found is None:
            return sample
        return sample.model_copy(
            update={
                "request_label": sample.request_label or found[0],
                "response_label": sample.response_label or found[1],
                "meta": {**sample.meta, "labelled_by": "released corpus"},
            }
        )


def known_labels(samples: Iterable[Sample]) -> KnownLabels:
    """The labels of all samples that have one."""
    found: dict[Content, set[tuple[GoldLabel | None, GoldLabel | None]]] = {}
    for sample in samples:
        if sample.request_label or sample.response_label:
            found.setdefault(content(sample), set()).add((sample.request_label, sample.response_label))
    return KnownLabels({key: next(iter(labels)) for key, labels in found.items() if len(labels) == 1})


def content(sample: Sample) -> Content:
    """What identifies a row in another packing of the same data."""
    return _plain(sample.prompt), _plain(sample.response or ""), len(sample.images)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
