"""How one exchange becomes a verdict, without any I/O (protocol, sections 2 and 3).

`judge` is a generator: it yields what it wants from an engine and receives the result, so that the same
policy serves one call, a batch in lockstep, and an event loop.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

from guardreasoner_vl.engines.base import EngineRequest, EngineResult, ScoreResult
from guardreasoner_vl.errors import GuardError, InputError, InputTooLongError
from guardreasoner_vl.images import ImageLimits, Picture, PixelBudget
from guardreasoner_vl.intake import take_in
from guardreasoner_vl.protocol import CANDIDATES, FAST_PREFIX, RESPONSE_FIELD, Reason, build_messages, parse_verdict
from guardreasoner_vl.types import MODES, Exchange, Judgement, Label, Mode, ModelInfo, Usage, Verdict, VerdictError

if TYPE_CHECKING:
    from collections.abc import Sequence

Action = Literal["allow", "block"]
REQUEST_FIELD = "Request:"
ANSWER_SHARE = 4
"""A window leaves this part of the model's context, or `max_new_tokens` if that is less, for the answer."""
MAX_WINDOWS = 1024
_MIN_WINDOW = 64
_REMEDIES = {
    Reason.TRUNCATED: "the reasoning did not end within the token limit; raise max_new_tokens or shorten the input",
    Reason.ENGINE: "the engine failed; try again",
}


@dataclass(frozen=True)
class Policy:
    """Everything that decides a verdict besides the model.

    `thresholds`: from which score on the request and the response are harmful; None lets the label decide.
    `band`: in `hybrid` mode, scores inside it are reasoned about. `long_input`: refuse what does not fit, or
    judge overlapping windows and let the worst verdict win.
    """

    mode: Mode = "slow"
    thresholds: tuple[float | None, float | None] = (None, None)
    band: tuple[float, float] = (0.1, 0.9)
    on_error: Action = "block"
    max_new_tokens: int = 1024
    retry_new_tokens: int = 4096
    long_input: Literal["refuse", "windows"] = "refuse"
    window_overlap: float = 0.2
    images: ImageLimits = field(default_factory=ImageLimits)
    pixels: PixelBudget | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"unknown mode {self.mode!r}: use one of {', '.join(MODES)}")
        if self.on_error not in ("allow", "block"):
            raise InputError(f"unknown on_error {self.on_error!r}: use block or allow")
        if self.long_input not in ("refuse", "windows"):
            raise InputError(f"unknown long_input {self.long_input!r}: use refuse or windows")
        if self.max_new_tokens < 1:
            raise InputError("max_new_tokens is a number of tokens: give at least 1")
        if len(self.thresholds) != 2:
            raise InputError("thresholds are two: one for the request, one for the response; None leaves one out")
        if not all(value is None or 0 <= value <= 1 for value in self.thresholds):
            raise InputError("a threshold is a probability: give a number from 0 to 1")
        if not 0 <= self.band[0] <= self.band[1] <= 1:
            raise InputError("the band is two probabilities, the lower one first")
        if not 0 <= self.window_overlap < 1:
            raise InputError("window_overlap is a share of a window: give a number from 0 to below 1")


@dataclass(frozen=True)
class Generate:
    """Please generate an answer."""

    request: EngineRequest


@dataclass(frozen=True)
class Score:
    """Please compare the label words in these slots."""

    request: EngineRequest
    slots: tuple[str, ...]


@dataclass(frozen=True)
class Count:
    """Please count the prompt's tokens."""

    request: EngineRequest


@dataclass(frozen=True)
class Counted:
    """Tokens of a prompt and what the model reads at most, where the engine knows them."""

    tokens: int | None
    limit: int | None


Call: TypeAlias = Generate | Score | Count
Reply: TypeAlias = EngineResult | ScoreResult | Counted
Asked = TypeVar("Asked", EngineResult, ScoreResult, Counted)
Judging: TypeAlias = Generator[Call, Reply, Verdict]


def _generated(request: EngineRequest) -> Generator[Call, Reply, EngineResult]:
    return _as(EngineResult, (yield Generate(request)))


def _scored(request: EngineRequest, slots: tuple[str, ...]) -> Generator[Call, Reply, ScoreResult]:
    return _as(ScoreResult, (yield Score(request, slots)))


def _counted(request: EngineRequest) -> Generator[Call, Reply, Counted]:
    return _as(Counted, (yield Count(request)))


def _as(kind: type[Asked], reply: Reply) -> Asked:
    if not isinstance(reply, kind):
        raise TypeError(f"{kind.__name__} was asked for, {type(reply).__name__} came")
    return reply


def judge(exchange: Exchange, policy: Policy, model: ModelInfo) -> Judging:
    """Judge one exchange; whatever goes wrong comes back as an error verdict."""
    try:
        taken, _ = take_in(exchange, policy.images)
    except InputError as error:
        return error_verdict(error, policy, model)
    if policy.long_input == "windows":
        return (yield from _judge_windows(taken, policy, model))
    return (yield from _judge_one(taken, policy, model))


def error_verdict(error: GuardError, policy: Policy, model: ModelInfo) -> Verdict:
    """The verdict for what could not be judged."""
    return _error(error.code, str(error), policy, model, Usage())


def _error(code: str, message: str, policy: Policy, model: ModelInfo, usage: Usage) -> Verdict:
    return Verdict(
        request=Judgement(label=Label.ERROR),
        response=Judgement(label=Label.ERROR),
        flagged=None,
        action=policy.on_error,
        mode=policy.mode,
        error=VerdictError(code=code, message=message),
        model=model,
        usage=usage,
    )


def _question(exchange: Exchange, policy: Policy) -> EngineRequest:
    pictures = tuple(picture for picture in exchange.all_images if isinstance(picture, Picture))
    return EngineRequest(build_messages(exchange), pictures, pixels=policy.pixels)


def _judge_one(exchange: Exchange, policy: Policy, model: ModelInfo) -> Judging:
    if policy.mode == "slow":
        return (yield from _slow(exchange, policy, model))
    verdict = yield from _fast(exchange, policy, model)
    low, high = policy.band
    scores = [judged.score for judged in (verdict.request, verdict.response) if judged.score is not None]
    if policy.mode == "fast" or verdict.error or not any(low <= score <= high for score in scores):
        return verdict
    reasoned = yield from _slow(exchange, policy, model)
    return reasoned.model_copy(update={"usage": verdict.usage + reasoned.usage})


def _fast(exchange: Exchange, policy: Policy, model: ModelInfo) -> Judging:
    """Compare the label words right after an empty think."""
    request = replace(_question(exchange, policy), forced_prefix=FAST_PREFIX)
    slots = ("", RESPONSE_FIELD) if exchange.has_response else ("",)
    result = yield from _scored(request, slots)
    if result.error is not None:
        return _error(result.error_code, result.error, policy, model, result.usage)
    found = [harm_probability(logprobs) for logprobs in result.logprobs]
    if len(found) != len(slots) or None in found:
        message = "the engine gave no usable score; try again or use mode 'slow'"
        return _error("no_score", message, policy, model, result.usage)
    judged = (exchange.has_prompt, exchange.has_response)
    scores = [score if applies else None for score, applies in zip((*found, None)[:2], judged, strict=True)]
    labels = [_label(score) for score in scores]
    return _verdict(labels, scores, None, result.usage, policy, model)


def _label(score: float | None, threshold: float = 0.5) -> Label:
    if score is None:
        return Label.NOT_APPLICABLE
    return Label.HARMFUL if score >= threshold else Label.UNHARMFUL


def _slow(exchange: Exchange, policy: Policy, model: ModelInfo) -> Judging:
    """Reason first; a truncated answer is asked for once more with a larger budget."""
    request = replace(
        _question(exchange, policy),
        max_new_tokens=policy.max_new_tokens,
        label_fields=(REQUEST_FIELD, RESPONSE_FIELD),
        candidates=CANDIDATES,
        ban_empty_think=True,
    )
    result = yield from _generated(request)
    usage = result.usage
    if result.finish_reason == "length" and (yield from _can_grow(request, policy)):
        result = yield from _generated(replace(request, max_new_tokens=policy.retry_new_tokens))
        usage += result.usage
    if result.error is not None:
        return _error(result.error_code, result.error, policy, model, usage)
    parsed = parse_verdict(result.text, exchange.has_prompt, exchange.has_response, result.finish_reason)
    if parsed.reason is not None:
        message = _REMEDIES.get(parsed.reason, f"the answer is outside the grammar ({parsed.reason})")
        return _error(parsed.reason.value, message, policy, model, usage)
    labels = [parsed.request, parsed.response]
    found = [result.label_logprobs.get(name) for name in (REQUEST_FIELD, RESPONSE_FIELD)]
    scores = [
        harm_probability(logprobs) if logprobs and label is not Label.NOT_APPLICABLE else None
        for logprobs, label in zip(found, labels, strict=True)
    ]
    return _verdict(labels, scores, parsed.reasoning, usage, policy, model)


def _can_grow(request: EngineRequest, policy: Policy) -> Generator[Call, Reply, bool]:
    """Whether the retry's budget and the model's context leave more room than the first attempt had."""
    if policy.retry_new_tokens <= request.max_new_tokens:
        return False
    counted = yield from _counted(request)
    if counted.tokens is None or counted.limit is None:
        return True
    return counted.limit - counted.tokens > request.max_new_tokens


def harm_probability(logprobs: Sequence[float]) -> float | None:
    """P(harmful) against P(unharmful) from the two words' log-probabilities; None where they say nothing."""
    if len(logprobs) != 2 or any(math.isnan(value) or value == math.inf for value in logprobs):
        return None
    harmful, unharmful = logprobs
    if harmful == unharmful == -math.inf:
        return None
    difference = min(max(unharmful - harmful, -700.0), 700.0)
    return 1 / (1 + math.exp(difference))


def _verdict(
    labels: Sequence[Label],
    scores: Sequence[float | None],
    reasoning: str | None,
    usage: Usage,
    policy: Policy,
    model: ModelInfo,
) -> Verdict:
    """The label decides; the score decides instead where a threshold is set."""
    judged = []
    for label, score, threshold in zip(labels, scores, policy.thresholds, strict=True):
        if threshold is not None and label is not Label.NOT_APPLICABLE:
            if score is None:
                message = "a threshold is set, but the engine gave no score; drop the threshold or change the engine"
                return _error("no_score", message, policy, model, usage)
            label = _label(score, threshold)
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


def _judge_windows(exchange: Exchange, policy: Policy, model: ModelInfo) -> Judging:
    """Judge overlapping pieces of a too long exchange; the worst verdict wins."""
    try:
        pieces = yield from _windows(exchange, policy)
    except InputError as error:
        return error_verdict(error, policy, model)
    verdicts: list[Verdict] = []
    for piece in pieces:
        verdict = yield from _judge_one(piece, policy, model)
        verdicts.append(verdict)
    worst = max(verdicts, key=_badness)
    usage = sum((verdict.usage for verdict in verdicts), Usage())
    failed = next((verdict for verdict in verdicts if verdict.error), None)
    if failed and not worst.flagged:
        return failed.model_copy(update={"usage": usage})
    merged = {
        name: max((getattr(verdict, name) for verdict in verdicts if not verdict.error), key=_judged_badness)
        for name in ("request", "response")
    }
    return worst.model_copy(update={**merged, "usage": usage})


def _badness(verdict: Verdict) -> tuple[bool, float]:
    return bool(verdict.flagged), max(verdict.request.score or 0.0, verdict.response.score or 0.0)


def _judged_badness(judgement: Judgement) -> tuple[int, float]:
    order = (Label.NOT_APPLICABLE, Label.UNHARMFUL, Label.HARMFUL)
    return order.index(judgement.label), judgement.score or 0.0


def _windows(exchange: Exchange, policy: Policy) -> Generator[Call, Reply, list[Exchange]]:
    """The exchange itself if it fits, else pieces of its prompt and response that do. Raises `InputTooLongError`."""
    whole = yield from _counted(_question(exchange, policy))
    if _fits(whole, policy):
        return [exchange]
    size = max(len(exchange.prompt or ""), len(exchange.response or ""))
    while size >= _MIN_WINDOW:
        size = size * 2 // 3
        prompts = _pieces(exchange.prompt, size, policy.window_overlap)
        responses = _pieces(exchange.response, size, policy.window_overlap)
        if len(prompts) * len(responses) > MAX_WINDOWS:
            break
        pieces = [replace(exchange, prompt=prompt, response=response) for prompt in prompts for response in responses]
        if (yield from _all_fit(pieces, policy)):
            return pieces
    raise InputTooLongError(
        f"the exchange takes {whole.tokens} tokens, the model reads {whole.limit}, and no {MAX_WINDOWS} windows of its "
        "prompt and response fit in: leave out text, history or pictures"
    )


def _all_fit(pieces: Sequence[Exchange], policy: Policy) -> Generator[Call, Reply, bool]:
    for piece in pieces:
        counted = yield from _counted(_question(piece, policy))
        if not _fits(counted, policy):
            return False
    return True


def _fits(counted: Counted, policy: Policy) -> bool:
    """Whether prompt and answer fit; where the engine cannot count, it is left to refuse."""
    if counted.tokens is None or counted.limit is None:
        return True
    return counted.tokens + min(policy.max_new_tokens, counted.limit // ANSWER_SHARE) <= counted.limit


def _pieces(text: str | None, size: int, overlap: float) -> list[str | None]:
    """Overlapping pieces of at most `size` characters; blank ones say nothing and are left out."""
    if text is None or len(text) <= size:
        return [text]
    stride = max(1, int(size * (1 - overlap)))
    pieces = (text[start : start + size] for start in range(0, len(text) - size + stride, stride))
    return [piece for piece in pieces if piece.strip()] or [None]
