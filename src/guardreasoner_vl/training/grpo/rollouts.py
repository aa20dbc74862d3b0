"""Rollouts: G answers to each prompt, their rewards and advantages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from guardreasoner_vl.errors import EngineError, InputError
from guardreasoner_vl.images.exchange import measured_exchange
from guardreasoner_vl.mining.rollout_io import derive_seed, parse_rollout, rollout_request
from guardreasoner_vl.protocol import build_messages
from guardreasoner_vl.rl.advantages import group_advantages
from guardreasoner_vl.rl.reward import Reward, reward
from guardreasoner_vl.sources.skipped import SkippedRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from guardreasoner_vl.engines.base import Engine, EngineRequest, EngineResult
    from guardreasoner_vl.engines.qwen import Encoded, QwenInputs
    from guardreasoner_vl.images.sizes import ImageSizes
    from guardreasoner_vl.recipe import GrpoSection
    from guardreasoner_vl.types import CheckedImage, Sample

AT_ONCE = 512
"""Answers generated between two checks of `stopped`."""


@dataclass(frozen=True)
class Rollout:
    """One answer: its tokens, with the end-of-turn token if it was generated, its reward, and for each token the
    log-probability that a sampler other than the network gave it.
    """

    ids: tuple[int, ...]
    reward: Reward
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class RolloutGroup:
    """The G completions of one prompt and their advantages."""

    sample: Sample
    prompt: Encoded
    images: tuple[CheckedImage, ...]
    completions: tuple[Rollout, ...]
    advantages: tuple[float, ...]

    @property
    def has_signal(self) -> bool:
        """Whether the group contributes a gradient; it does not if all rewards are equal."""
        return any(self.advantages)


def fitting(
    samples: Iterable[Sample], inputs: QwenInputs, section: GrpoSection, context: int | None, sizes: ImageSizes
) -> tuple[list[Sample], SkippedRows]:
    """Rows with a known label whose prompt is short enough, and the skipped ones; prompts are never truncated.

    A prompt must leave room for the longest completion in `context`, the model's context in tokens.
    """
    most = section.max_prompt_length
    if context is not None:
        most = min(most, context - section.max_completion_length)
    kept: list[Sample] = []
    skipped = SkippedRows()
    for sample in samples:
        if not (sample.request_label or sample.response_label):
            skipped.add("no label is known")
            continue
        try:
            exchange, images = measured_exchange(sample.exchange(), sizes)
            tokens = len(inputs.encode(build_messages(exchange), images).ids)
        except InputError as error:
            skipped.add(error.code)
            continue
        if tokens > most:
            skipped.add(f"its prompt is longer than {most} tokens")
        else:
            kept.append(sample)
    return kept, skipped


@runtime_checkable
class GroupEngine(Protocol):
    """An engine that reads a prompt once for all its answers, such as `VLLMEngine`."""

    def sample(self, requests: Sequence[EngineRequest], count: int) -> list[list[EngineResult]]:
        """`count` answers to each request, with their tokens' log-probabilities; seeds count up from the request's."""


def roll_out(
    samples: Sequence[Sample],
    engine: Engine,
    inputs: QwenInputs,
    section: GrpoSection,
    seed: str,
    stopped: Callable[[], bool] = lambda: False,
) -> list[RolloutGroup]:
    """Generate a group for each sample, or fewer if `stopped` becomes true. An answer's seed depends on its row alone.

    Raises `EngineError` if an answer could not be generated, `FloatingPointError` if a reward is NaN or infinite.
    """
    groups: list[RolloutGroup] = []
    # vLLM has a queue of its own, and its GPU would be idle at the end of each part.
    size = max(1, len(samples) if isinstance(engine, GroupEngine) else AT_ONCE // section.group_size)
    for start in range(0, len(samples), size):
        if stopped():
            break
        groups += _rolled_out(samples[start : start + size], engine, inputs, section, seed)
    return groups


def _rolled_out(
    samples: Sequence[Sample], engine: Engine, inputs: QwenInputs, section: GrpoSection, seed: str
) -> list[RolloutGroup]:
    requests = [
        replace(
            rollout_request(sample),
            max_new_tokens=section.max_completion_length,
            temperature=section.temperature,
            top_p=section.top_p,
        )
        for sample in samples
    ]
    answers = _sample_answers(engine, requests, [f"{seed}-{sample.id}" for sample in samples], section.group_size)
    groups = []
    for sample, request, results in zip(samples, requests, answers, strict=True):
        prompt = inputs.encode(request.messages, request.images)
        completions = tuple(judge_completion(result, sample, inputs, section) for result in results)
        rewards = torch.tensor([[rollout.reward.total for rollout in completions]], dtype=torch.float64)
        advantages = tuple(group_advantages(rewards)[0].tolist())
        groups.append(RolloutGroup(sample, prompt, request.images, completions, advantages))
    return groups


def _sample_answers(
    engine: Engine, requests: Sequence[EngineRequest], names: Sequence[str], count: int
) -> list[list[EngineResult]]:
    """`count` answers to each request; the request's name and the answer's place give the seed."""
    pairs = zip(requests, names, strict=True)
    if isinstance(engine, GroupEngine):
        return engine.sample([replace(request, seed=derive_seed(name)) for request, name in pairs], count)
    results = engine.generate(
        [replace(request, seed=derive_seed(f"{name}-{place}")) for request, name in pairs for place in range(count)]
    )
    return [results[start : start + count] for start in range(0, len(results), count)]


def judge_completion(result: EngineResult, sample: Sample, inputs: QwenInputs, section: GrpoSection) -> Rollout:
    """The tokens and the reward of one generated answer; raises `EngineError` if it could not be generated."""
    if result.finish_reason == "error":
        raise EngineError(f"a rollout failed ({result.error}): run the same command to resume from the last checkpoint")
    answer = parse_rollout(sample, result)
    tokens = len(inputs.tokens(answer.reasoning)) if answer.reasoning else 0
    ended = () if result.end_id is None else (result.end_id,)
    return Rollout(
        (*result.token_ids, *ended),
        reward(answer, sample, tokens, section.max_completion_length, section.reward),
        result.token_logprobs,
    )
