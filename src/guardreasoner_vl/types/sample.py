"""One labelled row of a corpus, for training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from guardreasoner_vl.types.exchange import Exchange, UnixLines
from guardreasoner_vl.types.verdict import Frozen

Modality = Literal["text", "image", "text-image"]
GoldLabel = Literal["harmful", "unharmful"]
Target = Literal["request", "response"]
"""What a label refers to: the request or the response."""


class Sample(Frozen):
    """One labelled row of a corpus. A null label means *not labelled*; `images` are readable file paths.

    Line ends are `\\n`, as in the exchange that is judged.
    """

    id: str = Field(description="Unique id of the row.")
    source: str = Field(description="Name of the data set.")
    split: str = Field(default="train", description="`train`, `validation` or `test`.")
    modality: Modality = Field(description="Text, image or both.")
    prompt: UnixLines = Field(default="", description="What the user wrote.")
    images: tuple[str, ...] = Field(default=(), description="Paths of the images.")
    response: UnixLines | None = Field(default=None, description="What the model answered; null if nothing.")
    request_label: GoldLabel | None = Field(default=None, description="Label of the request; null if not labelled.")
    response_label: GoldLabel | None = Field(default=None, description="Label of the response; null if not labelled.")
    reasoning: UnixLines | None = Field(default=None, description="The teacher's reasoning; null if none.")
    meta: dict[str, Any] = Field(default_factory=dict, description="What else is known of the row.")

    @property
    def has_request(self) -> bool:
        """Whether the request has text (not whitespace alone) or images."""
        return bool(self.prompt.strip() or self.images)

    @property
    def has_response(self) -> bool:
        """Whether the response has text (not whitespace alone)."""
        return bool(self.response and self.response.strip())

    def exchange(self) -> Exchange:
        """The row as an exchange. Raises `InputError` if it has no text and no image."""
        return Exchange(self.prompt or None, tuple(Path(path) for path in self.images), self.response)
