"""The model that training starts from."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from guardreasoner_vl.recipe.base import Section

_TOKEN_PIXELS = 28 * 28  # what one image token covers


class TextShape(Section):
    """Decoder of a small Qwen2.5-VL."""

    hidden_size: int = 320
    intermediate_size: int = 896
    layers: int = 6
    heads: int = 5
    kv_heads: int = 5
    max_positions: int = 2048
    rope_theta: float = 10_000.0

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.heads % self.kv_heads or self.hidden_size % (2 * self.heads):
            raise ValueError("hidden_size must be a multiple of 2 x heads, and heads a multiple of kv_heads")
        return self


class VisionShape(Section):
    """Vision tower of a small Qwen2.5-VL; `full_attention` lists the layers without windows."""

    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 6
    full_attention: tuple[int, ...] = (1, 3)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden_size % (4 * self.heads):
            raise ValueError("hidden_size must be a multiple of 4 x heads")
        if not all(0 <= layer < self.layers for layer in self.full_attention):
            raise ValueError(f"full_attention lists layers from 0 to {self.layers - 1}")
        return self


class NewModel(Section):
    """A Qwen2.5-VL to be made from nothing, its byte-level BPE learnt from the training texts."""

    vocab_size: int = Field(default=8192, ge=512)
    min_pixels: int = 56 * 56
    max_pixels: int = 224 * 224
    text: TextShape = TextShape()
    vision: VisionShape = VisionShape()

    @model_validator(mode="after")
    def _pixels(self) -> Self:
        if not _TOKEN_PIXELS <= self.min_pixels <= self.max_pixels:
            raise ValueError(f"use {_TOKEN_PIXELS} <= min_pixels <= max_pixels")
        return self


class ReadingSection(Section):
    """Drawn pictures that the vision tower learns to read from before SFT (`stages.reading`)."""

    pictures: int = Field(ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=16, ge=1)


class ModelSection(Section):
    """Where training starts: a folder or hub id, or a new model; `reading` first teaches a small one to read."""

    path: str | None = None
    revision: str | None = None
    new: NewModel | None = None
    reading: ReadingSection | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.path is None) == (self.new is None):
            raise ValueError("give either `path` (a folder or hub id) or `new` (a model to be made)")
        return self
