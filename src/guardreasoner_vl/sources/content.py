"""A digest of rows (texts, images, labels), to detect that they have changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from guardreasoner_vl.types import Sample

UNREADABLE = "unreadable"


def content_digest(samples: Iterable[Sample]) -> str:
    """SHA-256 of ids, texts, labels and image bytes, in the rows' order; image paths do not count."""
    digest = hashlib.sha256()
    for sample in samples:
        labels = (sample.request_label, sample.response_label)
        images = [_file_digest(Path(image)) for image in sample.images]
        digest.update(json.dumps([sample.id, sample.prompt, sample.response, *labels, images]).encode() + b"\n")
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return UNREADABLE
