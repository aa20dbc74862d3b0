"""The update: forward and backward passes over packed groups, within a budget of tokens.

Groups without signal are left out of the passes but counted in the loss's mean, so the gradient is the same.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from guardreasoner_vl.rl.loss import clipped_loss
from guardreasoner_vl.rl.shared_prefix import Branch, Packed, Tree, completion, log_probabilities, pack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from guardreasoner_vl.engines.qwen import QwenInputs
    from guardreasoner_vl.recipe import GrpoSection
    from guardreasoner_vl.training.grpo.rollouts import Group
    from guardreasoner_vl.types import CheckedImage


@dataclass(frozen=True)
class Pass:
    """What goes through the model at once: packed trees, images, and (tokens,) advantages and weights 1 / (N |o|)."""

    packed: Packed
    vision: dict[str, torch.Tensor]
    advantages: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class UpdateFigures:
    """Sums over the tokens of one update: the loss, tokens in it, clipped ones."""

    loss: float
    tokens: int
    clipped: int


class Passes:
    """Makes passes; each image of a rollout batch is cut into patches once."""

    def __init__(self, inputs: QwenInputs, section: GrpoSection, device: torch.device) -> None:
        self._inputs, self._section, self._device = inputs, section, device
        self._patches: dict[CheckedImage, NDArray[np.float32]] = {}

    def of(self, groups: Sequence[Group], total: int) -> list[Pass]:
        """Passes over the groups with signal; `total` is N, the completions that the loss is the mean of."""
        return [self._pass(batch, total) for batch in self._batches(groups)]

    def forget(self) -> None:
        """Drop the images of the last rollout batch."""
        self._patches.clear()

    def _batches(self, groups: Sequence[Group]) -> Iterator[list[tuple[Group, range]]]:
        """Pieces of groups that together stay within `pass_tokens`; one completion at least."""
        batch: list[tuple[Group, range]] = []
        room = self._section.pass_tokens
        for group in sorted((one for one in groups if one.has_signal), key=_tokens):
            for piece in _pieces(group, self._section.pass_tokens):
                needed = _tokens(group, piece)
                if batch and needed > room:
                    yield batch
                    batch, room = [], self._section.pass_tokens
                batch.append((group, piece))
                room -= needed
        if batch:
            yield batch

    def _pass(self, batch: Sequence[tuple[Group, range]], total: int) -> Pass:
        trees, advantages, weights = [], [], []
        for group, piece in batch:
            prompt = group.prompt
            chosen = [group.completions[place] for place in piece]
            branches = tuple(completion(one.ids, prompt.next_position) for one in chosen)
            trees.append(Tree(Branch(prompt.ids, prompt.positions), branches))
            for place, one in zip(piece, chosen, strict=True):
                advantages += [group.advantages[place]] * len(one.ids)
                weights += [1 / (total * len(one.ids))] * len(one.ids)
        return Pass(
            pack(trees).to(self._device),
            self._vision([group for group, _ in batch]),
            torch.tensor(advantages, device=self._device),
            torch.tensor(weights, device=self._device),
        )

    def _vision(self, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
        images = [image for group in groups for image in group.images]
        if not images:
            return {}
        for image in images:
            if image not in self._patches:
                self._patches[image] = self._inputs.patches([image.open()])
        grids = [(1, *grid) for group in groups for grid in group.prompt.grids]
        return {
            "pixel_values": torch.from_numpy(np.concatenate([self._patches[one] for one in images])).to(self._device),
            "image_grid_thw": torch.tensor(grids, device=self._device),
        }


def old_log_probabilities(model: Any, passes: Sequence[Pass], section: GrpoSection) -> list[torch.Tensor]:
    """Log-probabilities (tokens,) of each pass by the model as it is now."""
    with torch.no_grad():
        return [_log_probabilities(model, one, section) for one in passes]


def accumulate(
    model: Any, passes: Sequence[Pass], old: Sequence[torch.Tensor] | None, bound: float, section: GrpoSection
) -> UpdateFigures:
    """Add the gradients of all passes. Without `old` the model itself is the old one: the ratio is 1."""
    tokens = sum(len(one.weights) for one in passes)
    losses, clipped = [], []
    for number, one in enumerate(passes):
        logprobs = _log_probabilities(model, one, section)
        before = logprobs.detach() if old is None else old[number]
        found = clipped_loss(logprobs, before, one.advantages, one.weights, bound)
        torch.autograd.backward(found.loss)
        losses.append(found.loss.detach())
        clipped.append(found.clipped.sum())
    return UpdateFigures(float(sum(losses)), tokens, int(sum(clipped)))  # read off a GPU once, not after each pass


def autocast(section: GrpoSection, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 arithmetic over fp32 weights where the recipe says so."""
    return torch.autocast(device.type, torch.bfloat16) if section.precision == "bf16" else nullcontext()


def _log_probabilities(model: Any, one: Pass, section: GrpoSection) -> torch.Tensor:
    with autocast(section, one.weights.device):
        return log_probabilities(model, one.packed, one.vision, section.temperature)


def _tokens(group: Group, piece: range | None = None) -> int:
    chosen = group.completions if piece is None else [group.completions[place] for place in piece]
    return len(group.prompt.ids) + sum(len(one.ids) for one in chosen)


def _pieces(group: Group, most: int) -> Iterator[range]:
    """The group's completions in runs that fit behind the prompt, one at least in each."""
    start, room = 0, most - len(group.prompt.ids)
    for place, one in enumerate(group.completions):
        if place > start and len(one.ids) > room:
            yield range(start, place)
            start, room = place, most - len(group.prompt.ids)
        room -= len(one.ids)
    yield range(start, len(group.completions))
