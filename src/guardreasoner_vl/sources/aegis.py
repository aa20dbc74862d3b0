"""Aegis 1.0 (arXiv 2404.05993): user messages with the votes of three to five people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import RecordContext, SourceAdapter, sample_of, text_field, text_or_none
from guardreasoner_vl.sources.records import NotASampleError

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import Sample

_SAFE = "Safe"
_MOST_VOTES, _FEWEST_VOTES = 5, 3


def to_sample(record: Record, context: RecordContext) -> Sample | None:
    """Harmful if the majority voted anything but exactly `Safe`; None for messages that are not the user's."""
    if record.get("text_type") != "user_message":
        return None
    votes = [vote for number in range(_MOST_VOTES) if (vote := text_or_none(record, f"labels_{number}"))]
    if len(votes) < _FEWEST_VOTES:
        raise NotASampleError("fewer than three annotations")
    safe = votes.count(_SAFE)
    if 2 * safe == len(votes):
        raise NotASampleError("no majority")
    return sample_of(
        context,
        text_field(record, "text").strip(),
        request="unharmful" if 2 * safe > len(votes) else "harmful",
        category=_category(votes),
    )


def _category(votes: list[str]) -> str | None:
    """The most frequent kind of harm, the first one named on a tie; of a vote that lists several, the first counts."""
    named = Counter(vote.split(",")[0].strip() for vote in votes)
    del named[_SAFE]
    return next((kind for kind, _ in named.most_common(1)), None)


ADAPTER = SourceAdapter(
    name="aegis",
    files=("*train*.parquet", "data/train-*.parquet"),
    to_sample=to_sample,
    licence="CC-BY-4.0",
    origin="hub nvidia/Aegis-AI-Content-Safety-Dataset-1.0",
    hub="nvidia/Aegis-AI-Content-Safety-Dataset-1.0",
)
