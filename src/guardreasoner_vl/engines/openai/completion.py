"""Validates and reads the answers of OpenAI's chat completions, whole or streamed, and of its list of models."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, NonNegativeInt, ValidationError, WrapValidator

from guardreasoner_vl.engines.label_scores import Token
from guardreasoner_vl.engines.openai.chat_stream import reported_error
from guardreasoner_vl.engines.openai.mending import mended
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.types import Usage
from guardreasoner_vl.types.exchange import REASONING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic import ValidatorFunctionWrapHandler

INTERRUPTED = "the server interrupted the answer: see the server's log"
_ROUNDING = 1e-3  # a log-probability is at most 0, apart from rounding


def log_probability(value: Any) -> float | None:
    """The value as a number, -Infinity included; None if it is not a log-probability."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return min(float(value), 0.0) if value <= _ROUNDING else None
    except OverflowError:
        return None


def finite(likeliest: Iterable[tuple[str, Any]]) -> list[tuple[str, float]]:
    """The texts with a finite log-probability; empty if any value is not a number, as its text may be the likeliest."""
    numbers = [(text, log_probability(value)) for text, value in likeliest]
    if any(number is None for _, number in numbers):
        return []
    return [(text, number) for text, number in numbers if number is not None and number > -math.inf]


def _or_none(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return None


_Text = Annotated[str, BeforeValidator(lambda value: mended(value) if isinstance(value, str) else value)]
_NULL_IS_EMPTY = BeforeValidator(lambda value: [] if value is None else value)
_OPTIONAL = WrapValidator(_or_none)
"""An optional field: if its content is invalid, it becomes None."""


class _Logprob(BaseModel):
    token: _Text
    logprob: Annotated[float | None, BeforeValidator(log_probability)] = None
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None = None

    @property
    def text(self) -> str:
        return self.token if self.bytes is None else bytes(self.bytes).decode("utf-8", "replace")


class _TokenLogprob(_Logprob):
    top_logprobs: Annotated[list[_Logprob], _NULL_IS_EMPTY] = []

    @property
    def likeliest(self) -> tuple[tuple[str, float], ...]:
        """Texts and finite log-probabilities, as `finite` gives them."""
        return tuple(finite((top.text, top.logprob) for top in self.top_logprobs))


class _Logprobs(BaseModel):
    content: list[_TokenLogprob] | None = None


class _AnswerMessage(BaseModel):
    content: _Text | None = None
    reasoning: _Text | None = None
    reasoning_content: _Text | None = None
    thinking: _Text | None = None


class _Choice(BaseModel):
    message: _AnswerMessage
    finish_reason: str | None = None
    logprobs: Annotated[_Logprobs | None, _OPTIONAL] = None


class _PromptDetails(BaseModel):
    cached_tokens: NonNegativeInt | None = None


class _Usage(BaseModel):
    prompt_tokens: NonNegativeInt | None = None
    completion_tokens: NonNegativeInt | None = None
    prompt_tokens_details: Annotated[_PromptDetails | None, _OPTIONAL] = None


class Completion(BaseModel):
    """One answer of `/chat/completions`, only the fields used. Scores and usage are optional; null means empty."""

    choices: Annotated[list[_Choice], _NULL_IS_EMPTY]
    usage: Annotated[_Usage | None, _OPTIONAL] = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].message.content or ""

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def reasoning_split_off(self) -> bool:
        """Whether the server moved the reasoning out of the text (vLLM's `--reasoning-parser`)."""
        message = self.choices[0].message
        return any(getattr(message, name) for name in REASONING)

    @property
    def reports_cached_tokens(self) -> bool:
        """Whether the usage says how many prompt tokens came from the server's prefix cache."""
        return bool(self.usage and self.usage.prompt_tokens_details)

    def tokens(self) -> list[Token]:
        """The generated tokens with their likeliest alternatives; empty if the server sent no log-probabilities."""
        logprobs = self.choices[0].logprobs
        content = (logprobs.content if logprobs else None) or []
        return [Token(token.text, token.likeliest) for token in content]

    def used(self, seconds: float) -> Usage:
        """The tokens that the server counted, and `seconds` of wall-clock time."""
        usage = self.usage or _Usage()
        details = usage.prompt_tokens_details or _PromptDetails()
        return Usage(
            prompt_tokens=usage.prompt_tokens or 0,
            cached_tokens=details.cached_tokens or 0,
            completion_tokens=usage.completion_tokens or 0,
            seconds=seconds,
        )


class _DeltaChoice(BaseModel):
    delta: Annotated[_AnswerMessage, BeforeValidator(lambda value: value or {})] = _AnswerMessage()
    finish_reason: str | None = None
    logprobs: Annotated[_Logprobs | None, _OPTIONAL] = None


class _Chunk(BaseModel):
    choices: Annotated[list[_DeltaChoice], _NULL_IS_EMPTY] = []
    usage: Annotated[_Usage | None, _OPTIONAL] = None


class StreamedCompletion:
    """Assembles a streamed answer from its chunks; `completion` is the answer so far."""

    def __init__(self) -> None:
        self._message = _AnswerMessage()
        self._finish: str | None = None
        self._tokens: list[_TokenLogprob] = []
        self._usage: _Usage | None = None

    def add(self, chunk: Mapping[str, Any]) -> str:
        """Add one chunk; returns its text. Raises `EngineError` for a malformed chunk."""
        parsed = _validated(_Chunk, chunk)
        self._usage = parsed.usage or self._usage
        text = ""
        for choice in parsed.choices[:1]:
            text = choice.delta.content or ""
            for name, addition in choice.delta:
                if addition:
                    setattr(self._message, name, (getattr(self._message, name) or "") + addition)
            self._finish = choice.finish_reason or self._finish
            self._tokens += (choice.logprobs and choice.logprobs.content) or ()
        return text

    @property
    def completion(self) -> Completion:
        """The answer so far, in the form of an answer that was not streamed."""
        choice = _Choice(
            message=self._message, finish_reason=self._finish, logprobs=_Logprobs(content=self._tokens or None)
        )
        return Completion(choices=[choice], usage=self._usage)


class ServedModel(BaseModel):
    """One entry of `/models`; only vLLM sends `max_model_len`, in tokens."""

    id: str
    max_model_len: int | None = None


class ServedModels(BaseModel):
    """The answer of `/models`."""

    data: list[ServedModel]


ModelT = TypeVar("ModelT", bound=BaseModel)


def read_model(kind: type[ModelT], body: bytes) -> ModelT:
    """Parse an answer. Raises `EngineError`, which names the malformed field and never quotes the answer."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise malformed("not JSON") from None
    if isinstance(content, dict) and reported_error(content) is not None:
        raise EngineError(INTERRUPTED)
    return _validated(kind, content)


def _validated(kind: type[ModelT], content: Any) -> ModelT:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors(include_input=False)[0]["loc"]) or "not JSON"
    raise malformed(place)


def malformed(place: str) -> EngineError:
    """The error to raise for an answer whose field at `place` is malformed."""
    return EngineError(f"the server's answer is malformed ({place}): check that base_url is an OpenAI-compatible API")


def read_completion(body: bytes) -> Completion:
    """Parse an answer that holds at least one choice; raises `EngineError`."""
    completion = read_model(Completion, body)
    if not completion.choices:
        raise EngineError("the server's answer is malformed (choices): it contains no choice; see the server's log")
    return completion
