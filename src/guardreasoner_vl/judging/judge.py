"""Turns one exchange into a verdict, without any I/O (docs/protocol.md, sections 2 and 3).

`judge` is a generator: it yields calls to an engine and receives their results, so that the same code serves a single
call, a batch, and an event loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Literal

from guardreasoner_vl.errors import GuardError, InputError
from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.judging.calibration import EDGE
from guardreasoner_vl.judging.chunking import merge_worst, split_to_context
from guardreasoner_vl.judging.effects import (
    EngineCall,
    EngineReply,
    JudgingSteps,
    ModelCall,
    build_request,
    call_count,
    call_generate,
    call_read,
    call_score,
)
from guardreasoner_vl.judging.policy import action_on_error
from guardreasoner_vl.protocol import CANDIDATES, FAST_PREFIX, RESPONSE_FIELD, QuoteFilter, Reason, parse_verdict
from guardreasoner_vl.types import CheckedImage, Exchange, Judgement, Label, ModelInfo, Usage, Verdict, failed_verdict

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from guardreasoner_vl.engines.base import EngineRequest
    from guardreasoner_vl.judging.calibration import Scale
    from guardreasoner_vl.judging.policy import Policy

REQUEST_FIELD = "Request:"
_REMEDIES = {
    Reason.TRUNCATED: "the reasoning did not end within the token limit; raise max_new_tokens or shorten the input",
    Reason.ENGINE: "the engine failed; try again",
}
_RETRY = "try again, or use a model that was trained for this task"


def judge(exchange: Exchange, policy: Policy, model: ModelInfo) -> JudgingSteps:
    """Judge one exchange; invalid images and failures of the engine become error verdicts."""
    try:
        checked, _ = checked_exchange(exchange, policy.images)
        if policy.reads_printed_text(model):
            checked = yield from _with_printed_text(checked, model)
    except GuardError as error:
        return error_verdict(error, policy, model)
    if policy.long_input == "windows":
        return (yield from _judge_windows(checked, policy, model))
    return (yield from _judge_one(checked, policy, model))


def _with_printed_text(exchange: Exchange, model: ModelInfo) -> Generator[EngineCall, EngineReply, Exchange]:
    """The exchange with the words printed in each turn's images before the turn's prompt.

    For a model that does not read words they replace the image, because such an image misleads it.
    """
    turns = []
    for turn in (*exchange.history, exchange):
        texts, images = [], []
        for image in turn.images:
            text = (yield from call_read(image)) if isinstance(image, CheckedImage) else ""
            texts.append(text)
            if model.transcribes or not text.strip():
                images.append(image)
        parts = dict.fromkeys(text for text in (*texts, turn.prompt or "") if text.strip())
        turns.append(replace(turn, prompt="\n".join(parts), images=tuple(images)))
    return replace(exchange, prompt=turns[-1].prompt, images=turns[-1].images, history=tuple(turns[:-1]))


def error_verdict(error: GuardError, policy: Policy, model: ModelInfo) -> Verdict:
    """The verdict about an exchange that could not be judged."""
    return _error(error.code, str(error), policy, model, Usage())


def _error(code: str, message: str, policy: Policy, model: ModelInfo, usage: Usage) -> Verdict:
    return failed_verdict(code, message, policy.mode, model, usage, action_on_error(code, policy.on_error))


def _judge_one(exchange: Exchange, policy: Policy, model: ModelInfo) -> JudgingSteps:
    if policy.mode == "slow":
        if any(scale.unreasoned for scale in policy.scales("slow")):
            unreasoned = yield from _without_reasoning(exchange, policy)
            if unreasoned.error_code:
                return _error(unreasoned.error_code, unreasoned.error, policy, model, unreasoned.usage)
            return (yield from _slow(exchange, policy, model, unreasoned))
        return (yield from _slow(exchange, policy, model))
    unreasoned = yield from _without_reasoning(exchange, policy)
    verdict = _fast(unreasoned, policy, model)
    low, high = policy.doubt
    scores = [judged.score for judged in (verdict.request, verdict.response) if judged.score is not None]
    if policy.mode == "fast" or verdict.error or not any(low <= score <= high for score in scores):
        return verdict
    return (yield from _slow(exchange, policy, model, unreasoned))


@dataclass(frozen=True)
class _Unreasoned:
    """The result of comparing the label words after an empty think: log-odds of harm of request and response."""

    odds: tuple[float | None, float | None] = (None, None)
    usage: Usage = field(default_factory=Usage)
    error_code: str = ""
    error: str = ""


def _without_reasoning(exchange: Exchange, policy: Policy) -> Generator[EngineCall, EngineReply, _Unreasoned]:
    request = replace(build_request(exchange, policy), forced_prefix=FAST_PREFIX)
    slots = ("", RESPONSE_FIELD) if exchange.has_response else ("",)
    result = yield from call_score(request, slots)
    if result.error is not None:
        return _Unreasoned(usage=result.usage, error_code=result.error_code, error=result.error)
    odds = [log_odds(pair) for pair in result.logprobs]
    if len(odds) != len(slots) or None in odds:
        message = "the engine returned no usable score; try again, or use mode 'slow' without a calibration"
        return _Unreasoned(usage=result.usage, error_code="no_score", error=message)
    present = (exchange.has_prompt, exchange.has_response)
    request_odds, response_odds = (
        value if applies else None for value, applies in zip((*odds, None)[:2], present, strict=True)
    )
    return _Unreasoned((request_odds, response_odds), result.usage)


def _fast(unreasoned: _Unreasoned, policy: Policy, model: ModelInfo) -> Verdict:
    """The verdict without reasoning."""
    if unreasoned.error_code:
        return _error(unreasoned.error_code, unreasoned.error, policy, model, unreasoned.usage)
    scores = [
        None if odds is None else probability(odds, scale.temperature)
        for odds, scale in zip(unreasoned.odds, policy.scales("fast"), strict=True)
    ]
    return _verdict([_label_at(score) for score in scores], scores, None, unreasoned.usage, policy, model, "fast")


def _label_at(score: float | None, threshold: float = 0.5) -> Label:
    if score is None:
        return Label.NOT_APPLICABLE
    return Label.HARMFUL if score >= threshold else Label.UNHARMFUL


def _slow(exchange: Exchange, policy: Policy, model: ModelInfo, unreasoned: _Unreasoned | None = None) -> JudgingSteps:
    """Judge with reasoning; a truncated answer is requested once more with a larger token budget.

    `unreasoned` is the result without reasoning, if it was requested before.
    """
    unreasoned = unreasoned or _Unreasoned()
    request = replace(
        build_request(exchange, policy),
        max_new_tokens=policy.max_new_tokens,
        label_fields=(REQUEST_FIELD, RESPONSE_FIELD),
        candidates=CANDIDATES,
        ban_empty_think=True,
    )
    result = yield from call_generate(request)
    usage = unreasoned.usage + result.usage
    if result.finish_reason == "length" and (yield from _can_grow(request, policy)):
        result = yield from call_generate(replace(request, max_new_tokens=policy.retry_new_tokens))
        usage += result.usage
    if result.error is not None:
        return _error(result.error_code, result.error, policy, model, usage)
    parsed = parse_verdict(result.text, exchange.has_prompt, exchange.has_response, result.finish_reason)
    if parsed.reason is not None:
        message = _REMEDIES.get(parsed.reason, f"the answer is outside the grammar ({parsed.reason}); {_RETRY}")
        return _error(parsed.reason.value, message, policy, model, usage)
    labels = [parsed.request, parsed.response]
    reasoned = [result.label_logprobs.get(name) for name in (REQUEST_FIELD, RESPONSE_FIELD)]
    scores = [
        _reasoned_score(logprobs, before, scale) if logprobs and label is not Label.NOT_APPLICABLE else None
        for logprobs, before, label, scale in zip(reasoned, unreasoned.odds, labels, policy.scales("slow"), strict=True)
    ]
    verdict = _verdict(labels, scores, parsed.reasoning, usage, policy, model, "slow")
    quotes = QuoteFilter(request.messages, bool(request.images) and model.transcribes)
    reasoning = quotes.whole(verdict.reasoning or "") or None
    return verdict.model_copy(update={"reasoning": reasoning, "unsupported_quotes": quotes.dropped})


def _can_grow(request: EngineRequest, policy: Policy) -> Generator[EngineCall, EngineReply, bool]:
    """Whether the retry's budget and the model's context allow more tokens than the first attempt."""
    if policy.retry_new_tokens <= request.max_new_tokens:
        return False
    count = yield from call_count(request)
    if count.tokens is None or count.limit is None:
        return True
    return count.limit - count.tokens > request.max_new_tokens


def _reasoned_score(logprobs: Sequence[float], before: float | None, scale: Scale) -> float | None:
    """The score after reasoning, combined with the score before it, weighted by `scale.unreasoned`."""
    odds = log_odds(logprobs)
    if odds is None or not scale.unreasoned:
        return None if odds is None else probability(odds, scale.temperature)
    return (
        None if before is None else probability(_clipped(odds) + scale.unreasoned * _clipped(before), scale.temperature)
    )


def _clipped(odds: float) -> float:
    """The log-odds, clipped to those of the probabilities EDGE and 1 - EDGE, as in calibration."""
    bound = math.log(1 / EDGE - 1)
    return min(max(odds, -bound), bound)


def log_odds(logprobs: Sequence[float]) -> float | None:
    """log P(harmful) - log P(unharmful), perhaps infinite; None if the log-probabilities are unusable."""
    if len(logprobs) != 2 or any(math.isnan(value) or value == math.inf for value in logprobs):
        return None
    harmful, unharmful = logprobs
    return None if harmful == unharmful == -math.inf else harmful - unharmful


def probability(odds: float, temperature: float) -> float:
    """The probability whose log-odds are `odds` / `temperature`."""
    return 1 / (1 + math.exp(min(max(-odds / temperature, -700.0), 700.0)))


def _verdict(
    labels: Sequence[Label],
    scores: Sequence[float | None],
    reasoning: str | None,
    usage: Usage,
    policy: Policy,
    model: ModelInfo,
    judged_in: Literal["fast", "slow"],
) -> Verdict:
    """Build the verdict: a label comes from its threshold, if one is set, and else from the model."""
    judged = []
    for label, score, threshold in zip(labels, scores, policy.cutoffs(judged_in), strict=True):
        if threshold is not None and label is not Label.NOT_APPLICABLE:
            if score is None:
                message = (
                    "a threshold is set, but the engine returned no score; remove the threshold or change the engine"
                )
                return _error("no_score", message, policy, model, usage)
            label = _label_at(score, threshold)
        judged.append(Judgement(label=label, score=score))
    flagged = any(judgement.label is Label.HARMFUL for judgement in judged)
    return Verdict(
        request=judged[0],
        response=judged[1],
        flagged=flagged,
        action="block" if flagged else "allow",
        reasoning=reasoning or None,
        mode=policy.mode,
        model=model,
        usage=usage,
    )


def _judge_windows(exchange: Exchange, policy: Policy, model: ModelInfo) -> JudgingSteps:
    """Judge a long exchange in overlapping windows and return the worst verdict.

    Judging stops once the response, if there is one, is harmful, and the request is harmful or each of its chunks was
    judged. A harmful request alone does not stop it, because the meaning of a response's chunk depends on the request
    beside it. The scores are those of the windows judged.
    """
    try:
        prompts, responses = yield from split_to_context(exchange, policy)
    except InputError as error:
        return error_verdict(error, policy, model)
    if len(prompts) * len(responses) == 1:
        return (yield from _judge_one(exchange, policy, model))
    verdicts: list[Verdict] = []
    request_harmful, response_harmful = False, not exchange.has_response
    judged: set[int] = set()
    for (index, prompt), response in product(enumerate(prompts), responses):
        if response_harmful and (request_harmful or index in judged):
            continue
        verdict = yield from _as_window(_judge_one(replace(exchange, prompt=prompt, response=response), policy, model))
        verdicts.append(verdict)
        if verdict.error is None:
            judged.add(index)
            request_harmful |= verdict.request.label is Label.HARMFUL
            response_harmful |= verdict.response.label is Label.HARMFUL
    return merge_worst(verdicts)


def _as_window(judging: JudgingSteps) -> JudgingSteps:
    """Mark the calls of `judging` as those of a window."""
    reply: EngineReply | None = None
    while True:
        try:
            call = next(judging) if reply is None else judging.send(reply)
        except StopIteration as stop:
            verdict: Verdict = stop.value
            return verdict
        reply = yield replace(call, is_window=True) if isinstance(call, ModelCall) else call
