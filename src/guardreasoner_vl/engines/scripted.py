"""An engine that returns scripted answers instead of running a model, for tests and demonstrations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from guardreasoner_vl.engines.base import Capabilities, EngineRequest, EngineResult, ScoreResult
from guardreasoner_vl.engines.label_scores import label_offset, likeliest
from guardreasoner_vl.engines.validation import check_request, check_scoring, error_result, error_score
from guardreasoner_vl.errors import EngineError, GuardError
from guardreasoner_vl.types import ModelInfo, Usage

ScriptedAnswer: TypeAlias = str | EngineResult
"""The text of an answer, or a whole result."""

Scorer: TypeAlias = Callable[[EngineRequest, str], tuple[float, ...]]
"""The log-probabilities of a request's candidates after a text."""

ALL_CAPABILITIES = Capabilities(images=True, scores=True, forced_prefix=True, prefix_cache=False, max_context=None)
_CONFIDENT = 0.9


class ScriptedEngine:
    """Returns `answers`: in order from a sequence, or the result of calling a function with each request.

    When a sequence is used up, results are errors. A `GuardError` that the function raises becomes that request's
    error. `scores` returns one log-probability per candidate for a slot or a label field. Without it, the label that
    the answer contains has probability 0.9 (in `score`, which generates no text, the first candidate), and the other
    candidates share the rest. `requests` lists all requests in order, rejected ones included. Usage counts words.
    """

    def __init__(
        self,
        answers: Sequence[ScriptedAnswer] | Callable[[EngineRequest], ScriptedAnswer],
        *,
        scores: Scorer | None = None,
        capabilities: Capabilities = ALL_CAPABILITIES,
    ) -> None:
        self.requests: list[EngineRequest] = []
        self._answer = answers if callable(answers) else _answers_in_order(answers)
        self._scores = scores
        self._capabilities = capabilities

    @property
    def model(self) -> ModelInfo:
        """A model called `scripted`."""
        return ModelInfo(name="scripted")

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities that the constructor got."""
        return self._capabilities

    def count_tokens(self, request: EngineRequest) -> int | None:
        """Number of words and images in the messages and the forced prefix."""
        words = sum(len(message.text.split()) for message in request.messages)
        return words + len(request.images) + len(request.forced_prefix.split())

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        """Return the next answer for each request, in order."""
        return [self._generate(request) for request in requests]

    def score(
        self, requests: Sequence[EngineRequest], slots: Sequence[str], candidates: Sequence[str]
    ) -> list[ScoreResult]:
        """Score each slot with `scores`, or prefer the first candidate without it."""
        return [self._score(request, slots, candidates) for request in requests]

    async def agenerate(self, request: EngineRequest) -> EngineResult:
        """`generate` for one request; it does not wait."""
        return self._generate(request)

    async def ascore(self, request: EngineRequest, slots: Sequence[str], candidates: Sequence[str]) -> ScoreResult:
        """`score` for one request; it does not wait."""
        return self._score(request, slots, candidates)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def _generate(self, request: EngineRequest) -> EngineResult:
        self.requests.append(request)
        try:
            check_request(request, self._capabilities)
            answer = self._answer(request)
        except GuardError as error:
            return error_result(error)
        result = EngineResult(answer, "stop") if isinstance(answer, str) else answer
        if result.finish_reason == "error":
            return result
        text = request.forced_prefix + result.text.removeprefix(request.forced_prefix)
        if request.listener:
            request.listener.on_start()
            request.listener.on_text(text.removeprefix(request.forced_prefix))
        return replace(
            result,
            text=text,
            label_logprobs=result.label_logprobs or self._label_logprobs(request, text),
            usage=self._usage(request, len(result.text.split())) if result.usage == Usage() else result.usage,
        )

    def _label_logprobs(self, request: EngineRequest, text: str) -> Mapping[str, tuple[float, ...]]:
        if not self._capabilities.scores:
            return {}
        logprobs: dict[str, tuple[float, ...]] = {}
        for field in request.label_fields:
            start = label_offset(text, field)
            if start is None or start < len(request.forced_prefix):
                continue
            for index, candidate in enumerate(request.candidates):
                if text.startswith(candidate, start):
                    logprobs[field] = self._logprobs(request, field, index, len(request.candidates))
        return logprobs

    def _logprobs(self, request: EngineRequest, slot: str, chosen: int, count: int) -> tuple[float, ...]:
        return self._scores(request, slot) if self._scores else _confident(chosen, count)

    def _score(self, request: EngineRequest, slots: Sequence[str], candidates: Sequence[str]) -> ScoreResult:
        self.requests.append(request)
        try:
            check_scoring(request, self._capabilities)
            logprobs = tuple(self._logprobs(request, slot, 0, len(candidates)) for slot in slots)
        except GuardError as error:
            return error_score(error)
        return ScoreResult(logprobs, tuple(map(likeliest, logprobs)), self._usage(request, len(slots)))

    def _usage(self, request: EngineRequest, words: int) -> Usage:
        return Usage(prompt_tokens=self.count_tokens(request) or 0, completion_tokens=words)


def _answers_in_order(answers: Sequence[ScriptedAnswer]) -> Callable[[EngineRequest], ScriptedAnswer]:
    remaining = iter(answers)

    def answer(_: EngineRequest) -> ScriptedAnswer:
        try:
            return next(remaining)
        except StopIteration:
            raise EngineError(f"the script has only {len(answers)} answers: add more") from None

    return answer


def _confident(chosen: int, count: int) -> tuple[float, ...]:
    if count == 1:
        return (math.log(_CONFIDENT),)
    rest = math.log((1.0 - _CONFIDENT) / (count - 1))
    return tuple(math.log(_CONFIDENT) if index == chosen else rest for index in range(count))
