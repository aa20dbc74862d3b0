"""Fill missing labels from labelled rows with the same content."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.types import Provenance

if TYPE_CHECKING:
    from collections.abc import Iterable

    from guardreasoner_vl.types import GoldLabel, Sample

Content = tuple[str, str, int]
"""Normalised prompt and response, and the number of images, since repackaging changes image bytes."""


@dataclass(frozen=True)
class KnownLabels:
    """Request and response labels by content; contents with contradictory labels are left out."""

    labels: dict[Content, tuple[GoldLabel | None, GoldLabel | None]]

    def applied(self, sample: Sample) -> Sample:
        """The sample with missing labels filled in, and their origin in `meta`."""
        labels = self.labels.get(content_key(sample))
        if labels is None:
            return sample
        update = {
            "request_label": sample.request_label or labels[0],
            "response_label": sample.response_label or labels[1],
        }
        return sample.model_copy(update=update).with_provenance(Provenance(labelled_by="released corpus"))


def known_labels(samples: Iterable[Sample]) -> KnownLabels:
    """Collect the labels of all labelled samples."""
    by_content: dict[Content, set[tuple[GoldLabel | None, GoldLabel | None]]] = {}
    for sample in samples:
        if sample.request_label or sample.response_label:
            by_content.setdefault(content_key(sample), set()).add((sample.request_label, sample.response_label))
    return KnownLabels({key: next(iter(labels)) for key, labels in by_content.items() if len(labels) == 1})


def content_key(sample: Sample) -> Content:
    """The key that identifies a row in another release of the same data."""
    return _normalised_text(sample.prompt), _normalised_text(sample.response or ""), len(sample.images)


def _normalised_text(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
