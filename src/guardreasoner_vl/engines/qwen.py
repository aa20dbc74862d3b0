"""Inputs of the Qwen2.5-VL family: chat text, image patches, positions (docs/method.md, section 8).

Reads only `tokenizer.json` and `preprocessor_config.json`, because the stock processor requires torchvision.
Training and inference use the same code, so both see the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from guardreasoner_vl.engines.model_files import PROCESSOR, json_object
from guardreasoner_vl.errors import InputError, ModelError
from guardreasoner_vl.images.geometry import PixelBudget, smart_resize
from guardreasoner_vl.protocol import IMAGE, TargetLabel, training_target

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image
    from tokenizers import Tokenizer

    from guardreasoner_vl.images.sizes import ImageSize
    from guardreasoner_vl.protocol import Message
    from guardreasoner_vl.types import CheckedImage

IMAGE_PAD = "<|image_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
_ANSWER = "".join(span.text for span in training_target("-", TargetLabel("harmful"), TargetLabel("unharmful")))


@dataclass(frozen=True)
class Encoded:
    """One prompt: token ids, the image grids in patches (height, width), and positions of shape (3, tokens)."""

    ids: list[int]
    grids: list[tuple[int, int]]
    positions: NDArray[np.int64]

    @property
    def next_position(self) -> int:
        """The position of the first token after the prompt, the same on all three axes."""
        return int(self.positions.max()) + 1 if self.ids else 0


@dataclass
class QwenInputs:
    """Tokenizer and image processor of one model folder."""

    tokenizer: Tokenizer
    image_processor: Any
    budget: PixelBudget
    patch: int = 14
    merge: int = 2
    token_id: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path, processor: Path | None = None) -> QwenInputs:
        """Read the model in `folder`; the image processor's settings are those in the folder `processor`, if given.

        Raises `ModelError` when a file is missing or broken.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        settings_path = (processor or folder) / PROCESSOR
        for path in (folder / "tokenizer.json", settings_path):
            if not path.is_file():
                raise ModelError(f"{path.parent}: no {path.name}; give the folder of a complete Qwen2.5-VL model")
        tokenizer = _tokenizer(folder)
        settings = json_object(settings_path)
        size = settings.get("size") or {}
        try:
            budget = PixelBudget(
                settings.get("min_pixels") or size.get("shortest_edge") or PixelBudget.min_pixels,
                settings.get("max_pixels") or size.get("longest_edge") or PixelBudget.max_pixels,
            )
            shape = {key: int(settings.get(key, usual)) for key, usual in (("patch_size", 14), ("merge_size", 2))}
            kept = {key: settings[key] for key in ("image_mean", "image_std", "temporal_patch_size") if key in settings}
            processor = Qwen2VLImageProcessorPil(**shape, **kept)
        except (InputError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{settings_path} has invalid values; download it again") from error
        ids = {}
        for token in (IMAGE_PAD, "<|video_pad|>", END_OF_TURN, END_OF_TEXT, VISION_START, VISION_END):
            token_id = tokenizer.token_to_id(token)
            if token_id is None:
                raise ModelError(f"{folder}: the tokenizer has no token {token}; give a Qwen2.5-VL model")
            ids[token] = token_id
        if tokenizer.decode(tokenizer.encode(_ANSWER).ids, skip_special_tokens=False) != _ANSWER:
            raise ModelError(f"{folder}: the tokenizer cannot encode an answer's tags; give a Qwen2.5-VL model")
        return cls(tokenizer, processor, budget, shape["patch_size"], shape["merge_size"], ids)

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[CheckedImage | ImageSize] = (),
        assistant: str = "",
        budget: PixelBudget | None = None,
    ) -> Encoded:
        """Encode the chat, followed by `assistant` as the start of the assistant's turn."""
        grids = [self.grid(image.height, image.width, budget) for image in images]
        return self.encoded(self.tokens(chat_text(messages, [self.pads(grid) for grid in grids]) + assistant), grids)

    def encoded(self, ids: list[int], grids: list[tuple[int, int]]) -> Encoded:
        """Add the positions to token ids and image grids."""
        return Encoded(ids, grids, self.positions(ids, grids))

    def tokens(self, text: str) -> list[int]:
        """The token ids of `text`, without added special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def grid(self, height: int, width: int, budget: PixelBudget | None = None) -> tuple[int, int]:
        """The patch grid (height, width) of an image of this size in pixels, after resizing."""
        new_height, new_width = smart_resize(height, width, budget or self.budget, self.patch * self.merge)
        return new_height // self.patch, new_width // self.patch

    def pads(self, grid: tuple[int, int]) -> int:
        """Number of tokens of an image: one for each merged patch."""
        return grid[0] * grid[1] // self.merge**2

    def patches(self, images: Sequence[Image], budget: PixelBudget | None = None) -> NDArray[np.float32]:
        """Pixel values of shape (patches, 3 * 2 * 14 * 14)."""
        budget = budget or self.budget
        size = {"shortest_edge": budget.min_pixels, "longest_edge": budget.max_pixels}
        values = self.image_processor(images=list(images), size=size, return_tensors="np")["pixel_values"]
        return np.asarray(values, dtype=np.float32)

    def positions(self, ids: Sequence[int], grids: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
        """M-RoPE positions of shape (3, tokens): text counts up, an image spans (1, height, width)."""
        positions = np.empty((3, len(ids)), dtype=np.int64)
        is_pad = np.asarray(ids) == self.token_id[IMAGE_PAD]
        at = following = 0
        for height, width in grids:
            start = at + int(np.argmax(is_pad[at:]))
            positions[:, at:start] = np.arange(start - at) + following
            following += start - at
            rows, columns = height // self.merge, width // self.merge
            end = start + rows * columns
            positions[0, start:end] = following
            positions[1, start:end] = following + np.repeat(np.arange(rows), columns)
            positions[2, start:end] = following + np.tile(np.arange(columns), rows)
            following += max(rows, columns)
            at = end
        positions[:, at:] = np.arange(len(ids) - at) + following
        return positions

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end the assistant's turn."""
        return frozenset((self.token_id[END_OF_TURN], self.token_id[END_OF_TEXT]))


def _tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{folder}: tokenizer.json cannot be read; download it again") from error


def chat_text(messages: Sequence[Message], pads: Sequence[int] = ()) -> str:
    """The chat in Qwen's format up to the start of the assistant's answer; each `<image>` becomes its image pads."""
    parts: list[str] = []
    for message in messages:
        parts += (f"<|im_start|>{message.role}\n", message.text, f"{END_OF_TURN}\n")
    first, *others = "".join(parts).split(IMAGE)
    if len(others) != len(pads):
        raise InputError(
            f"the messages have {len(others)} image placeholders for {len(pads)} images; pass one image for each"
        )
    text = first
    for count, following in zip(pads, others, strict=True):
        text += f"{VISION_START}{IMAGE_PAD * count}{VISION_END}{following}"
    return f"{text}<|im_start|>assistant\n"
