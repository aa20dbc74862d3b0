"""GuardReasoner-VLTrain (arXiv 2505.11049) as its authors released it, and corpora exported in that layout.

Three JSON lists (texts, images, texts with images) of `{"messages": [system, user, assistant], "images": [path]}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import RecordContext, SourceAdapter
from guardreasoner_vl.sources.conversations import conversation_of, conversation_sample, read_conversations

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import Sample


def to_sample(record: Record, context: RecordContext) -> Sample:
    """Read one released conversation. Raises `NotASampleError`."""
    return conversation_sample(conversation_of(record, context, "messages", "role", "content"), record, context)


ADAPTER = SourceAdapter(
    name="guardreasoner-vltrain",
    files=("*.json",),
    to_sample=to_sample,
    licence="Apache-2.0",
    origin="hub yueliu1999/GuardReasoner-VLTrain",
    hub="yueliu1999/GuardReasoner-VLTrain",
    read=read_conversations,
)
