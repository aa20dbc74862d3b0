"""The interface of adapters for other guards: building their requests and reading their answers.

An adapter uses its guard's published prompt and answer format; any other answer is an error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from guardreasoner_vl.engines.openai.chat import GREEDY
from guardreasoner_vl.engines.openai.completion import finite, read_completion
from guardreasoner_vl.errors import EngineError, InputError
from guardreasoner_vl.types import CheckedImage, Judgement, Label, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from guardreasoner_vl.types import Exchange

ApiPath = Literal["chat/completions", "completions", "moderations"]
TOP = 20
"""Number of alternatives requested for each generated token."""

MIN_MASS = 0.01
"""Tokens at which the label words have less probability in total than this are not the label and give no score."""


class UnsupportedError(InputError):
    """The guard does not judge this kind of exchange."""

    code = "unsupported"


class UnreadableError(EngineError):
    """The guard's answer does not follow its published format."""

    code = "unparsable"


WRONG_GUARD = "check that the server runs the guard whose adapter is used"
"""The remedy in messages of `UnreadableError`."""


@dataclass(frozen=True)
class AdapterRequest:
    """One request to a guard; `payload` is called when the request is sent, `targets` are what its answer judges."""

    path: ApiPath
    payload: Callable[[], dict[str, Any]]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class AdapterAnswer:
    """A guard's answer: its text, tokens with their alternatives, and number of tokens."""

    text: str
    tokens: Sequence[Mapping[str, float]] = ()
    """For each generated token, the log-probabilities of the likeliest tokens by text."""
    completion_tokens: int = 0
    content: Mapping[str, Any] = field(default_factory=dict)
    """The whole body, for interfaces that do not return text."""


class Adapter(Protocol):
    """Builds the requests of one guard and reads its answers."""

    @property
    def reasons(self) -> bool:
        """Whether the guard writes reasoning before its labels."""

    def build_requests(self, exchange: Exchange) -> list[AdapterRequest]:
        """The requests for judging an exchange whose images are checked. Raises `UnsupportedError`."""

    def read(self, request: AdapterRequest, answer: AdapterAnswer) -> dict[Target, Judgement]:
        """Read the judgements from one answer. Raises `UnreadableError`."""


def read_guard_answer(path: ApiPath, body: bytes) -> AdapterAnswer:
    """Parse a server's answer. Raises `EngineError`."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise EngineError("the server's answer is not JSON: check that base_url is an OpenAI-compatible API")
    if path == "moderations":
        return AdapterAnswer("", content=content)
    if path == "completions":
        return _read_text_completion(content)
    completion = read_completion(body)
    tokens = [dict(token.top) for token in completion.tokens()]
    return AdapterAnswer(completion.text, tokens, completion.used(0.0).completion_tokens, content)


def _read_text_completion(content: Mapping[str, Any]) -> AdapterAnswer:
    """Parse an answer of `/completions`."""
    try:
        choice = content["choices"][0]
        text = choice["text"]
        logprobs = (choice.get("logprobs") or {}).get("top_logprobs") or []
        tokens = [dict(finite((str(word), value) for word, value in (top or {}).items())) for top in logprobs]
        used = int((content.get("usage") or {}).get("completion_tokens") or 0)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EngineError("the server's answer is malformed: check that the server has /completions") from error
    if not isinstance(text, str):
        raise EngineError("the server's answer is malformed (text): check that the server has /completions")
    return AdapterAnswer(text, tokens, used, content)


def judgement_of(harmful: bool, score: float | None = None) -> Judgement:
    """A judgement with this label and, if there is one, score."""
    return Judgement(label=Label.HARMFUL if harmful else Label.UNHARMFUL, score=score)


def score_of(tokens: Sequence[Mapping[str, float]], harmful: Sequence[str], unharmful: Sequence[str]) -> float | None:
    """P(harmful words) / P(harmful or unharmful words), at the first token where they have at least `MIN_MASS`.

    Tokens are compared without surrounding white space. None if there is no such token.
    """
    for alternatives in tokens:
        bad = sum(math.exp(value) for word, value in alternatives.items() if word.strip() in harmful)
        good = sum(math.exp(value) for word, value in alternatives.items() if word.strip() in unharmful)
        if bad + good >= MIN_MASS:
            return bad / (bad + good)
    return None


def text_only(exchange: Exchange, name: str) -> None:
    """Raise `UnsupportedError` if the exchange has images."""
    if exchange.all_images:
        raise UnsupportedError(f"{name} accepts no images; use it for text benchmarks")


def one_image(exchange: Exchange, name: str) -> CheckedImage:
    """The exchange's only image. Raises `UnsupportedError` unless there is exactly one."""
    images = [image for image in exchange.all_images if isinstance(image, CheckedImage)]
    if len(images) != 1:
        raise UnsupportedError(f"{name} judges exactly one image; the exchange has {len(images)}")
    return images[0]


def greedy(max_tokens: int) -> dict[str, Any]:
    """Parameters of `/chat/completions` for greedy decoding with log-probabilities."""
    return {**GREEDY, "max_tokens": max_tokens, "logprobs": True, "top_logprobs": TOP}


def greedy_plain(max_tokens: int) -> dict[str, Any]:
    """Parameters of `/completions` for greedy decoding with log-probabilities."""
    return {**GREEDY, "max_tokens": max_tokens, "logprobs": TOP}
