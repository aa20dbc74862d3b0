"""What every part of a recipe is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Immutable part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")
