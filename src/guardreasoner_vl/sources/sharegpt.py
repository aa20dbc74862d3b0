"""ShareGPT rows, as LLaMA-Factory reads them, whose conversations follow the protocol.

`{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}], "system": ..., "images": [path]}`,
as a list (JSON) or one a line (JSON lines).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import RecordContext, SourceAdapter
from guardreasoner_vl.sources.conversations import conversation_of, conversation_sample, read_conversations

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import Sample


def to_sample(record: Record, context: RecordContext) -> Sample:
    """Read one ShareGPT conversation. Raises `NotASampleError`."""
    return conversation_sample(conversation_of(record, context, "conversations", "from", "value"), record, context)


ADAPTER = SourceAdapter(
    name="sharegpt",
    # One pattern for JSON and JSON lines: LLaMA-Factory's own JSON file lies beside JSON lines.
    files=("*.json*",),
    to_sample=to_sample,
    licence="not recorded",
    origin="a program that writes ShareGPT rows, such as `corpus export`",
    read=read_conversations,
)
