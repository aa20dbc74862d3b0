"""What is learnt from: one labelled row of a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from guardreasoner_vl.types.exchange import Exchange, UnixLines
from guardreasoner_vl.types.verdict import Frozen

Modality = Literal["text", "image", "text-image"]
GoldLabel = Literal["harmful", "unharmful"]
Target = Literal["request", "response"]
"""What a label is about."""


class Sample(Frozen):
    """One labelled row of a corpus. A null label means *not labelled*; `images` are readable file paths.

    Line ends are `\\n`, as in the exchange that is judged.
    """

    id: str
    source: str
    split: str = "train"
    modality: Modality
    prompt: UnixLines = ""
    images: tuple[str, ...] = ()
    response: UnixLines | None = None
    request_label: GoldLabel | None = None
    response_label: GoldLabel | None = None
    reasoning: UnixLines | None = None
    meta: dict[str, Any] = Field(default_factory=dict)

    def exchange(self) -> Exchange:
        """The exchange to be judged; raises `InputError` if the row holds nothing."""
        return Exchange(self.prompt or None, tuple(Path(path) for path in self.images), self.response)
