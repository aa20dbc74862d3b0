"""ShareGPT rows, as LLaMA-Factory trains on them, whose conversations are in the protocol's form.

`{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}], "system": ..., "images": [path]}`,
as a list (JSON) or one a line (JSON lines).
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
    return sample_from(conversation_of(record, place, "conversations", "from", "value"), record, place)


ADAPTER = Adapter(
    name="sharegpt",
    # JSON and JSON lines at once: beside JSON lines lies LLaMA-Factory's own JSON.
    files=("*.json*",),
    to_sample=to_sample,
    licence="not recorded",
    origin="a program that writes ShareGPT rows, such as `corpus export`",
    read=read_rows,
)
