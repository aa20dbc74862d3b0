"""GuardReasoner-VLTrain (arXiv 2505.11049) as its authors released it, and corpora that we export in that layout.

Three lists, for texts, images and both, of `{"messages": [system, user, assistant], "images": [path]}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import Adapter, Place
from guardreasoner_vl.sources.conversations import conversation_of, read_rows, sample_from

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import Sample


def to_sample(record: Record, place: Place) -> Sample:
    """Raises `NotASampleError`."""
    return sample_from(conversation_of(record, place, "messages", "role", "content"), record, place)


ADAPTER = Adapter(
    name="guardreasoner-vltrain",
    files=("*.json",),
    to_sample=to_sample,
    licence="Apache-2.0",
    origin="hub yueliu1999/GuardReasoner-VLTrain",
    hub="yueliu1999/GuardReasoner-VLTrain",
    read=read_rows,
)
