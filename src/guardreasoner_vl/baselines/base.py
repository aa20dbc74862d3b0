"""What an adapter for another guard is: how it is asked, and how its answer is read.

An adapter uses its guard's own published prompt and grammar; what that grammar does not allow is an error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from guardreasoner_vl.engines.openai.chat import GREEDY, finite, read_completion
from guardreasoner_vl.errors import EngineError, InputError
from guardreasoner_vl.types import CheckedImage, Judgement, Label, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from guardreasoner_vl.types import Exchange

Path = Literal["chat/completions", "completions", "moderations"]
TOP = 20
"""Alternatives asked for at each generated token."""

LEAST_MASS = 0.01
"""A score whose two words have less probability together was read at a wrong place, and is none."""


class UnsupportedError(InputError):
    """The guard does not judge this kind of exchange."""

    code = "unsupported"


class UnreadableError(EngineError):
    """The guard's answer is outside its own grammar."""

    code = "unparsable"


@dataclass(frozen=True)
class Ask:
    """One request; `payload` is called when it is its turn. `about` says what its answer is about."""

    path: Path
    payload: Callable[[], dict[str, Any]]
    about: tuple[Target, ...]


@dataclass(frozen=True)
class Answer:
    """The text, each generated token with its likeliest alternatives, and the tokens that it took."""

    text: str
    tokens: Sequence[Mapping[str, float]] = ()
    """For each generated token: texts and log-probabilities of the likeliest."""
    completion_tokens: int = 0
    content: Mapping[str, Any] = field(default_factory=dict)
    """The whole body, for interfaces that answer no text."""


class Adapter(Protocol):
    """One guard."""

    @property
    def reasons(self) -> bool:
        """Whether it writes reasoning before its labels."""

    def asks(self, exchange: Exchange) -> list[Ask]:
        """What to ask about an exchange whose images were taken in. Raises `UnsupportedError`."""

    def read(self, ask: Ask, answer: Answer) -> dict[Target, Judgement]:
        """The judgements of one answer. Raises `UnreadableError`."""


def read_answer(path: Path, body: bytes) -> Answer:
    """Parse a server's answer; raises `EngineError`."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise EngineError("the server's answer is not JSON: check that base_url is an OpenAI-compatible API")
    if path == "moderations":
        return Answer("", content=content)
    if path == "completions":
        return _plain(content)
    completion = read_completion(body)
    tokens = [dict(token.top) for token in completion.tokens()]
    return Answer(completion.text, tokens, completion.used(0.0).completion_tokens, content)


def _plain(content: Mapping[str, Any]) -> Answer:
    """An answer of `/completions`."""
    try:
        choice = content["choices"][0]
        text = choice["text"]
        logprobs = (choice.get("logprobs") or {}).get("top_logprobs") or []
        tokens = [dict(finite((str(word), value) for word, value in (top or {}).items())) for top in logprobs]
        used = int((content.get("usage") or {}).get("completion_tokens") or 0)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EngineError("the server's answer is malformed: check that it serves /completions") from error
    if not isinstance(text, str):
        raise EngineError("the server's answer is malformed (text): check that it serves /completions")
    return Answer(text, tokens, used, content)


def judged(harmful: bool, score: float | None = None) -> Judgement:
    """A label, with its score where there is one."""
    return Judgement(label=Label.HARMFUL if harmful else Label.UNHARMFUL, score=score)


def score_of(tokens: Sequence[Mapping[str, float]], harmful: Sequence[str], unharmful: Sequence[str]) -> float | None:
    """P(a harmful word) against P(an unharmful one) at the first generated token that may be one of them.

    Words are compared stripped. None where they have next to no probability everywhere.
    """
    for alternatives in tokens:
        bad = sum(math.exp(value) for word, value in alternatives.items() if word.strip() in harmful)
        good = sum(math.exp(value) for word, value in alternatives.items() if word.strip() in unharmful)
        if bad + good >= LEAST_MASS:
            return bad / (bad + good)
    return None


def text_only(exchange: Exchange, name: str) -> None:
    """Raises `UnsupportedError` for images."""
    if exchange.all_images:
        raise UnsupportedError(f"{name} reads no images; judge text benchmarks with it")


def one_image(exchange: Exchange, name: str) -> CheckedImage:
    """The exchange's image; raises `UnsupportedError` unless there is exactly one."""
    images = [image for image in exchange.all_images if isinstance(image, CheckedImage)]
    if len(images) != 1:
        raise UnsupportedError(f"{name} judges one image at a time, here are {len(images)}")
    return images[0]


def greedy(most: int) -> dict[str, Any]:
    """Greedy decoding of at most that many tokens, with log-probabilities in a chat."""
    return {**GREEDY, "max_tokens": most, "logprobs": True, "top_logprobs": TOP}


def greedy_plain(most: int) -> dict[str, Any]:
    """The same for `/completions`."""
    return {**GREEDY, "max_tokens": most, "logprobs": TOP}
