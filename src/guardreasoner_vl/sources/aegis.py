"""Aegis 1.0 (arXiv 2404.05993): user messages with the votes of three to five people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import Adapter, Place, sample_of, text_of, text_or_none
from guardreasoner_vl.sources.records import NotASampleError

if TYPE_CHECKING:
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import Sample

_SAFE = "Safe"
_MOST_VOTES, _FEWEST_VOTES = 5, 3


def to_sample(record: Record, place: Place) -> Sample | None:
    """Harmful if most votes are another word than exactly `Safe`; messages of other kinds are left out."""
    if record.get("text_type") != "user_message":
        return None
    votes = [vote for number in range(_MOST_VOTES) if (vote := text_or_none(record, f"labels_{number}"))]
    if len(votes) < _FEWEST_VOTES:
        raise NotASampleError("fewer than three annotations")
    safe = votes.count(_SAFE)
    if 2 * safe == len(votes):
        raise NotASampleError("no majority")
    return sample_of(
        place,
        text_of(record, "text").strip(),
        request="unharmful" if 2 * safe > len(votes) else "harmful",
        category=_category(votes),
    )


def _category(votes: list[str]) -> str | None:
    """The kind of harm named most often, the earlier one on a tie; a vote that lists several counts for its first."""
    named = Counter(vote.split(",")[0].strip() for vote in votes)
    del named[_SAFE]
    return next((kind for kind, _ in named.most_common(1)), None)


ADAPTER = Adapter(
    name="aegis",
    files=("*train*.parquet", "data/train-*.parquet"),
    to_sample=to_sample,
    licence="CC-BY-4.0",
    origin="hub nvidia/Aegis-AI-Content-Safety-Dataset-1.0",
    hub="nvidia/Aegis-AI-Content-Safety-Dataset-1.0",
)
