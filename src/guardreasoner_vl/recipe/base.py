"""The base class of the sections of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Immutable part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")
