"""Batched decoding for a Qwen2.5-VL: prefix cache, prefill, steps, shrinking batches.

Rows are padded between the shared prefix and each row's own tokens:

    [prefix | pad pad row's tokens | generated ...]

The prefix (system message and the head of the user turn) is computed once and copied to every row. Rows can be
repeated after the prefill (`Batch.keep_rows`), so that many answers to one prompt cost one prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from transformers.cache_utils import Cache, DynamicLayer

from guardreasoner_vl.engines.qwen import IMAGE_PAD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from guardreasoner_vl.engines.qwen import Encoded, QwenInputs
    from guardreasoner_vl.images.geometry import PixelBudget

_ROOM = 64
StoredLayers: TypeAlias = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Keys and values, per layer, each of shape (rows, heads, tokens, width)."""


def buffer_length(tokens: int) -> int:
    """The length of the buffer that is made when `tokens` have to fit, with room for more."""
    return max(tokens + _ROOM, tokens * 3 // 2)


class GrowingLayer(DynamicLayer):
    """Keys and values in preallocated buffers, so that a step copies one token and not all earlier ones.

    All four tensors have shape (rows, heads, tokens, width); `keys` and `values` are views of the buffers' filled part.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_buffer: torch.Tensor
    value_buffer: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of shape (rows, heads, new tokens, width); returns those of all tokens."""
        past = self.get_seq_length() if self.is_initialized else 0
        end = past + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if past == 0 or end > self.key_buffer.shape[-2]:
            self.key_buffer = self._grown(self.keys, past, end, key_states)
            self.value_buffer = self._grown(self.values, past, end, value_states)
        self.key_buffer[:, :, past:end] = key_states
        self.value_buffer[:, :, past:end] = value_states
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values

    def _grown(self, old: torch.Tensor, past: int, end: int, like: torch.Tensor) -> torch.Tensor:
        rows, heads, _, width = like.shape
        buffer = like.new_empty(rows, heads, buffer_length(end), width)
        if past:
            buffer[:, :, :past] = old
        return buffer

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keep the rows with these indices, of shape (kept,), in this order; an index may occur several times."""
        length = self.get_seq_length()
        self.key_buffer, self.value_buffer = self.key_buffer[rows], self.value_buffer[rows]
        self.keys, self.values = self.key_buffer[:, :, :length], self.value_buffer[:, :, :length]


class GrowingCache(Cache):
    """The keys and values of a batch's rows, layer by layer."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[GrowingLayer() for _ in range(layers)])

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keep the rows with these indices, of shape (kept,), in this order; an index may occur several times."""
        for layer in self.layers:
            layer.keep_rows(rows)

    def stored(self) -> StoredLayers:
        """A copy of the keys and values, per layer."""
        return tuple((layer.keys.clone(), layer.values.clone()) for layer in self.layers)


class RowCache(Protocol):
    """The keys and values of a batch's rows, in this process or in a compiled graph."""

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keep the rows with these indices, of shape (kept,), in this order; an index may occur several times."""

    def stored(self) -> StoredLayers:
        """A copy of the keys and values, per layer."""


@dataclass(frozen=True)
class Prefix:
    """The tokens that every prompt starts with, and their keys and values, per layer (1, heads, tokens, width)."""

    ids: tuple[int, ...]
    layers: StoredLayers

    def starts(self, ids: Sequence[int]) -> bool:
        """Whether `ids` starts with the prefix and has further tokens."""
        return len(ids) > len(self.ids) and tuple(ids[: len(self.ids)]) == self.ids


@dataclass
class Batch:
    """Rows that are being decoded: their cache, mask of shape (rows, tokens read), next positions of shape (rows,), and
    last logits of shape (rows, vocabulary)."""

    cache: RowCache
    mask: torch.Tensor
    next_position: torch.Tensor
    logits: torch.Tensor

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keep the rows with these indices, of shape (kept,), in this order; an index may occur several times."""
        self.cache.keep_rows(rows)
        self.mask, self.next_position, self.logits = self.mask[rows], self.next_position[rows], self.logits[rows]


class Decoder:
    """Forward passes of one model."""

    def __init__(self, model: Any, inputs: QwenInputs) -> None:
        self.model = model
        self.inputs = inputs
        self.layer_count: int = model.config.text_config.num_hidden_layers

    @property
    def device(self) -> torch.device:
        """The model's current device; a trainer may move the model."""
        device: torch.device = self.model.device
        return device

    def compute_prefix(self, ids: Sequence[int]) -> Prefix:
        """Compute the keys and values of the tokens that every prompt starts with."""
        cache = self._new_cache()
        positions = torch.arange(len(ids), device=self.device).view(1, 1, -1).expand(3, 1, -1)
        self._forward(torch.tensor([list(ids)], device=self.device), None, positions, cache)
        return Prefix(tuple(ids), cache.stored())

    def prefill(
        self,
        rows: Sequence[Encoded],
        images: Sequence[Image],
        prefix: Prefix | None = None,
        budget: PixelBudget | None = None,
    ) -> Batch:
        """Read the prompts. `images` holds all rows' images in order; a repeated image is encoded once."""
        skipped = len(prefix.ids) if prefix else 0
        longest = max(len(row.ids) for row in rows) - skipped
        ids = torch.full((len(rows), longest), self.inputs.token_id["<|endoftext|>"])
        mask = torch.zeros((len(rows), skipped + longest), dtype=torch.long)
        mask[:, :skipped] = 1
        positions = torch.zeros((3, len(rows), longest), dtype=torch.long)
        for number, row in enumerate(rows):
            count = len(row.ids) - skipped
            ids[number, longest - count :] = torch.tensor(row.ids[skipped:])
            mask[number, skipped + longest - count :] = 1
            positions[:, number, longest - count :] = torch.from_numpy(row.positions[:, skipped:])
        cache = self._new_cache(prefix, len(rows))
        mask = mask.to(self.device)
        grids = [grid for row in rows for grid in row.grids]
        vision = self._vision(images, grids, budget) if images else None
        logits = self._forward(ids.to(self.device), mask, positions.to(self.device), cache, vision)
        following = torch.tensor([row.next_position for row in rows], device=self.device)
        return Batch(cache, mask, following, logits)

    def extend(self, batch: Batch, tokens: Sequence[Sequence[int]]) -> None:
        """Read further tokens of every row; rows with fewer tokens are padded on the left."""
        if not all(tokens):
            raise ValueError("a row without further tokens has no new logits: remove it with keep_rows")
        longest = max(map(len, tokens))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in tokens], device=self.device)
        new = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens], device=self.device)
        offsets = (new.cumsum(1) - 1).clamp(min=0)
        positions = (batch.next_position[:, None] + offsets)[None].expand(3, -1, -1)
        batch.mask = torch.cat((batch.mask, new), dim=1)
        batch.logits = self._forward(ids, batch.mask, positions, batch.cache)
        batch.next_position = batch.next_position + new.sum(1)

    def _new_cache(self, prefix: Prefix | None = None, rows: int = 1) -> RowCache:
        """The cache of `rows` rows that have read the prefix, or nothing."""
        cache = GrowingCache(self.layer_count)
        if prefix:
            for layer, (keys, values) in zip(cache.layers, prefix.layers, strict=True):
                layer.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        return cache

    def _vision(
        self, images: Sequence[Image], grids: Sequence[tuple[int, int]], budget: PixelBudget | None
    ) -> torch.Tensor:
        """All images' features in order, of shape (merged patches, width); each distinct image is encoded once."""
        first_index: dict[int, int] = {}
        for index, image in enumerate(images):
            first_index.setdefault(id(image), index)
        distinct = list(first_index.values())
        pixels = torch.from_numpy(self.inputs.patches([images[index] for index in distinct], budget)).to(self.device)
        shapes = torch.tensor([(1, *grids[index]) for index in distinct], device=self.device)
        with torch.inference_mode():
            features = self.model.get_image_features(pixels, shapes).pooler_output
            features_of = dict(zip(distinct, features, strict=True))
            return torch.cat([features_of[first_index[id(image)]] for image in images])

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        cache: RowCache,
        vision: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last token's logits in fp32, of shape (rows, vocabulary); `vision` replaces the image pads' embeddings.

        Copied outside of inference mode, because a tensor created inside it cannot be changed in place later.
        """
        with torch.inference_mode():
            embedded = self.model.get_input_embeddings()(ids)
            if vision is not None:
                pads = ids == self.inputs.token_id[IMAGE_PAD]
                if int(pads.sum()) != len(vision):
                    raise ValueError(
                        "the number of image pads in the prompts differs from the number of image features"
                    )
                embedded = embedded.masked_scatter(pads[..., None], vision.to(embedded.dtype))
            logits = self._last_logits(embedded, mask, positions, cache)
        return logits.to(torch.float32, copy=True)

    def _last_logits(
        self, embedded: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """The last token's logits, of shape (rows, vocabulary), for embeddings of shape (rows, tokens, width)."""
        logits: torch.Tensor = self.model(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits
