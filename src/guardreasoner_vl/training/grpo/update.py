"""The update: forward and backward passes over packed groups, within a budget of tokens.

Groups without signal have a gradient of zero: the passes skip them, and the loss's mean counts them.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from guardreasoner_vl.engines.qwen import END_OF_TEXT
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.rl.importance import importance_weights
from guardreasoner_vl.rl.loss import clipped_loss
from guardreasoner_vl.rl.shared_prefix import Branch, Packed, Tree, completion, log_probabilities, pack
from guardreasoner_vl.training.blank import BLANK, blank_branch, blank_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from guardreasoner_vl.engines.qwen import QwenInputs
    from guardreasoner_vl.recipe import GrpoSection
    from guardreasoner_vl.training.grpo.ranks import DistributedContext
    from guardreasoner_vl.training.grpo.rollouts import RolloutGroup
    from guardreasoner_vl.types import CheckedImage

_log = logging.getLogger(__name__)
_FEWEST_TOKENS = 64  # as few as `grpo.pass_tokens` may be
_T = TypeVar("_T")


@dataclass(frozen=True)
class Pass:
    """The input of one forward pass: packed trees, images, and (tokens,) advantages and weights 1 / (N |o|).

    `sampled` are the log-probabilities (tokens,) that a sampler other than the network gave; None without one.
    """

    packed: Packed
    vision: dict[str, torch.Tensor]
    advantages: torch.Tensor
    weights: torch.Tensor
    sampled: torch.Tensor | None = None


@dataclass(frozen=True)
class UpdateFigures:
    """Sums over one update: its loss, the number of its tokens, and how many of them were clipped.

    `differences` (tokens,) are the old log-probabilities less those of a sampler other than the network
    (`rl.importance`); empty without such a sampler.
    """

    loss: float
    tokens: int
    clipped: int
    differences: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


class PolicyNetwork(torch.nn.Module):
    """The network as one call that gives log-probabilities: FSDP gathers weights around the `forward` of a module."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, packed: Packed, vision: Mapping[str, torch.Tensor], temperature: float) -> torch.Tensor:
        """The log-probability of each branch token, as in `rl.shared_prefix`."""
        return log_probabilities(self.network, packed, vision, temperature)


class Passes:
    """Makes passes of at most `tokens` tokens; each image of a rollout batch is cut into patches once.

    `sharing` are the ranks, if they share the weights: all of them then make the same number of passes, and a pass
    without images gets a blank image, to which no group's token attends.
    """

    def __init__(
        self,
        inputs: QwenInputs,
        section: GrpoSection,
        device: torch.device,
        sharing: DistributedContext | None = None,
    ) -> None:
        self._inputs, self._device, self._sharing = inputs, device, sharing
        self.tokens = section.pass_tokens
        self._patches: dict[CheckedImage, NDArray[np.float32]] = {}

    def of(self, groups: Sequence[RolloutGroup], total: int) -> list[Pass]:
        """Passes over the groups with signal; `total` is N, the number of completions over which the loss is a mean.

        The order of their tokens depends on the groups alone.
        """
        passes = [self._pass(batch, total) for batch in self._batches(groups)]
        if self._sharing:
            passes += [self._pass([], total)] * (self._sharing.largest(len(passes)) - len(passes))
        return passes

    def forget(self) -> None:
        """Drop the images of the last rollout batch."""
        self._patches.clear()

    def within_memory(self, work: Callable[[], _T]) -> _T:
        """The result of `work`, which makes passes; when the device's memory runs out, `tokens` is halved for good.

        `work` then begins again. Raises `EngineError` if the memory does not hold the smallest passes, or if ranks
        share the weights: the others would wait for what this one does not compute.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                if self._sharing:
                    fewer = max(_FEWEST_TOKENS, self.tokens // 2)
                    raise EngineError(
                        f"an update ran out of the device's memory: set grpo.pass_tokens: {fewer}, then run the same "
                        "command to resume from the last checkpoint"
                    ) from error
                if self.tokens < 2 * _FEWEST_TOKENS:
                    raise EngineError(
                        "one answer and its prompt do not fit the device's memory: set grpo.gradient_checkpointing, "
                        "lower grpo.max_completion_length, or use more GPUs"
                    ) from error
                self.tokens //= 2
            _log.warning("the device ran out of memory: passes have %d tokens from here on", self.tokens)

    def _batches(self, groups: Sequence[RolloutGroup]) -> Iterator[list[tuple[RolloutGroup, range]]]:
        """Batches of group pieces of at most `tokens` tokens; a batch has at least one completion."""
        batch: list[tuple[RolloutGroup, range]] = []
        room = self.tokens
        for group in sorted((one for one in groups if one.has_signal), key=_token_count):
            for piece in _completion_ranges(group, self.tokens):
                needed = _token_count(group, piece)
                if batch and needed > room:
                    yield batch
                    batch, room = [], self.tokens
                batch.append((group, piece))
                room -= needed
        if batch:
            yield batch

    def _pass(self, batch: Sequence[tuple[RolloutGroup, range]], total: int) -> Pass:
        trees, advantages, weights, sampled = [], [], [], list[float]()
        for group, piece in batch:
            prompt = group.prompt
            chosen = [group.completions[place] for place in piece]
            branches = tuple(completion(rollout.ids, prompt.next_position) for rollout in chosen)
            trees.append(Tree(Branch(prompt.ids, prompt.positions), branches))
            for place, rollout in zip(piece, chosen, strict=True):
                advantages += [group.advantages[place]] * len(rollout.ids)
                weights += [1 / (total * len(rollout.ids))] * len(rollout.ids)
                sampled += rollout.logprobs
        vision = self._vision([group for group, _ in batch])
        packed = pack(trees) if vision or not self._sharing else self._packed_with_blank(trees)
        return Pass(
            packed.to(self._device),
            vision or (self._blank_vision() if self._sharing else {}),
            torch.tensor(advantages, device=self._device),
            torch.tensor(weights, device=self._device),
            torch.tensor(sampled, device=self._device) if sampled else None,
        )

    def _packed_with_blank(self, trees: Sequence[Tree]) -> Packed:
        """Pack the trees and one of the blank image, whose branch, which a tree must have, is no target."""
        end = completion([self._inputs.token_id[END_OF_TEXT]], 0)
        packed = pack([*trees, Tree(blank_branch(self._inputs), (end,))])
        return replace(packed, predicts=packed.predicts[:-1], targets=packed.targets[:-1])

    def _vision(self, groups: Sequence[RolloutGroup]) -> dict[str, torch.Tensor]:
        images = [image for group in groups for image in group.images]
        if not images:
            return {}
        for image in images:
            if image not in self._patches:
                self._patches[image] = self._inputs.patches([image.open()])
        grids = [grid for group in groups for grid in group.prompt.grids]
        return self._arguments([self._patches[image] for image in images], grids)

    def _blank_vision(self) -> dict[str, torch.Tensor]:
        return self._arguments([self._inputs.patches([blank_image()])], [self._inputs.grid(BLANK, BLANK)])

    def _arguments(
        self, patches: Sequence[NDArray[np.float32]], grids: Sequence[tuple[int, int]]
    ) -> dict[str, torch.Tensor]:
        """The model's arguments for images as patches, and for their grids (height, width)."""
        return {
            "pixel_values": torch.from_numpy(np.concatenate(patches)).to(self._device),
            "image_grid_thw": torch.tensor([(1, *grid) for grid in grids], device=self._device),
        }


def old_log_probabilities(policy: PolicyNetwork, passes: Sequence[Pass], section: GrpoSection) -> torch.Tensor:
    """Log-probabilities (tokens,) of all passes by the policy as it is."""
    with torch.no_grad():
        parts = [_pass_log_probabilities(policy, part, section) for part in passes]
    return torch.cat(parts) if parts else torch.zeros(0)


def accumulate(
    policy: PolicyNetwork, passes: Sequence[Pass], old: torch.Tensor | None, bound: float, section: GrpoSection
) -> UpdateFigures:
    """Accumulate the gradients of all passes.

    `old` holds the old policy's log-probabilities (tokens,) of all passes; without it the ratio is 1.
    """
    sizes = [len(part.weights) for part in passes]
    olds = [None] * len(passes) if old is None else torch.split(old, sizes)
    losses, clipped, differences = [], [], [torch.zeros(0)]
    cap = section.rollouts.importance_cap
    for part, of_part in zip(passes, olds, strict=True):
        logprobs = _pass_log_probabilities(policy, part, section)
        before = logprobs.detach() if of_part is None else of_part
        weights = part.weights
        if part.sampled is not None:
            difference = before - part.sampled
            differences.append(difference.cpu())
            if cap is not None:
                weights = weights * importance_weights(difference, cap)
        result = clipped_loss(logprobs, before, part.advantages, weights, bound)
        torch.autograd.backward(result.loss)
        losses.append(result.loss.detach())
        clipped.append(result.clipped.sum())
    figures = float(sum(losses)), sum(sizes), int(sum(clipped))  # copied from a GPU once, not per pass
    return UpdateFigures(*figures, torch.cat(differences))


def autocast(section: GrpoSection, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 arithmetic over fp32 weights if the recipe's precision is `bf16`."""
    return torch.autocast(device.type, torch.bfloat16) if section.precision == "bf16" else nullcontext()


def _pass_log_probabilities(policy: PolicyNetwork, part: Pass, section: GrpoSection) -> torch.Tensor:
    with autocast(section, part.weights.device):
        logprobs: torch.Tensor = policy(part.packed, part.vision, section.temperature)
    return logprobs


def _token_count(group: RolloutGroup, piece: range | None = None) -> int:
    chosen = group.completions if piece is None else [group.completions[place] for place in piece]
    return len(group.prompt.ids) + sum(len(one.ids) for one in chosen)


def _completion_ranges(group: RolloutGroup, most: int) -> Iterator[range]:
    """Ranges of the group's completions that fit into `most` tokens with the prompt, at least one in each."""
    start, room = 0, most - len(group.prompt.ids)
    for place, rollout in enumerate(group.completions):
        if place > start and len(rollout.ids) > room:
            yield range(start, place)
            start, room = place, most - len(group.prompt.ids)
        room -= len(rollout.ids)
    yield range(start, len(group.completions))
