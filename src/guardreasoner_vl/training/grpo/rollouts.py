"""Rollouts: G answers to each prompt, their rewards and advantages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from guardreasoner_vl.errors import EngineError, InputError
from guardreasoner_vl.mining.rollout_io import asked, parsed, seed_of
from guardreasoner_vl.rl.advantages import group_advantages
from guardreasoner_vl.rl.reward import Reward, reward
from guardreasoner_vl.sources.skipped import SetAside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from guardreasoner_vl.engines.base import Engine, EngineResult
    from guardreasoner_vl.engines.qwen import Encoded, QwenInputs
    from guardreasoner_vl.recipe import GrpoSection
    from guardreasoner_vl.types import CheckedImage, Sample

_AT_ONCE = 512  # answers between two looks at whether to stop


@dataclass(frozen=True)
class Completion:
    """One answer's tokens, the end of the turn included where it came, and its reward."""

    ids: tuple[int, ...]
    reward: Reward


@dataclass(frozen=True)
class Group:
    """One prompt's completions and their advantages."""

    sample: Sample
    prompt: Encoded
    images: tuple[CheckedImage, ...]
    completions: tuple[Completion, ...]
    advantages: tuple[float, ...]

    @property
    def has_signal(self) -> bool:
        """Whether the group moves the model: completions of equal reward do not."""
        return any(self.advantages)


def fitting(samples: Iterable[Sample], engine: Engine, section: GrpoSection) -> tuple[list[Sample], SetAside]:
    """Rows with a known label whose prompt is short enough; prompts are never cut.

    Each must leave room for the longest completion in the model's context.
    """
    most, context = section.max_prompt_length, engine.capabilities.max_context
    if context is not None:
        most = min(most, context - section.max_completion_length)
    kept: list[Sample] = []
    left = SetAside()
    for sample in samples:
        if not (sample.request_label or sample.response_label):
            left.add("no label is known")
            continue
        try:
            tokens = engine.count_tokens(asked(sample))
        except InputError as error:
            left.add(error.code)
            continue
        if tokens is not None and tokens > most:
            left.add(f"its prompt is longer than {most} tokens")
        else:
            kept.append(sample)
    return kept, left


def roll_out(
    samples: Sequence[Sample],
    engine: Engine,
    inputs: QwenInputs,
    section: GrpoSection,
    seed: str,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Group]:
    """A group for each sample, or fewer if `stopped` came true on the way. An answer's seed depends on its row alone.

    Raises `EngineError` if an answer could not be generated, `FloatingPointError` for a reward that is no number.
    """
    groups: list[Group] = []
    size = max(1, _AT_ONCE // section.group_size)
    for start in range(0, len(samples), size):
        if stopped():
            break
        groups += _rolled_out(samples[start : start + size], engine, inputs, section, seed)
    return groups


def _rolled_out(
    samples: Sequence[Sample], engine: Engine, inputs: QwenInputs, section: GrpoSection, seed: str
) -> list[Group]:
    requests = []
    for sample in samples:
        request = replace(asked(sample), max_new_tokens=section.max_completion_length, temperature=section.temperature)
        seeds = (seed_of(f"{seed}-{sample.id}-{place}") for place in range(section.group_size))
        requests += [replace(request, seed=number) for number in seeds]
    results = engine.generate(requests)
    groups, size = [], section.group_size
    for number, sample in enumerate(samples):
        request, own = requests[number * size], results[number * size : (number + 1) * size]
        prompt = inputs.encode(request.messages, request.images)
        completions = tuple(_completion(result, sample, inputs, section) for result in own)
        rewards = torch.tensor([[one.reward.total for one in completions]], dtype=torch.float64)
        advantages = tuple(group_advantages(rewards)[0].tolist())
        groups.append(Group(sample, prompt, request.images, completions, advantages))
    return groups


def _completion(result: EngineResult, sample: Sample, inputs: QwenInputs, section: GrpoSection) -> Completion:
    if result.finish_reason == "error":
        raise EngineError(f"a rollout failed ({result.error}): the same command goes on from the last checkpoint")
    said = parsed(sample, result)
    tokens = len(inputs.tokens(said.reasoning)) if said.reasoning else 0
    ended = () if result.end_id is None else (result.end_id,)
    return Completion(
        (*result.token_ids, *ended), reward(said, sample, tokens, section.max_completion_length, section.reward)
    )
