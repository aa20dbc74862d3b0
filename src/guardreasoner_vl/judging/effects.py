"""The calls that judging one exchange needs (generate, score, count, read), and the request that they send.

`JudgingSteps` is a generator: it yields calls, receives the replies, and returns the verdict. It never uses an engine
itself, so that its caller can batch the calls of many exchanges.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from guardreasoner_vl.engines.base import EngineRequest, EngineResult, ScoreResult
from guardreasoner_vl.protocol import build_messages
from guardreasoner_vl.types import CheckedImage, Exchange, Verdict

if TYPE_CHECKING:
    from guardreasoner_vl.errors import GuardError
    from guardreasoner_vl.judging.policy import Policy


@dataclass(frozen=True)
class GenerateCall:
    """Generate an answer. `is_window` marks one of many calls about one exchange, which may run later than others."""

    request: EngineRequest
    is_window: bool = False


@dataclass(frozen=True)
class ScoreCall:
    """Compare the label words in these slots; `is_window` as in `GenerateCall`."""

    request: EngineRequest
    slots: tuple[str, ...]
    is_window: bool = False


@dataclass(frozen=True)
class CountCall:
    """Count the prompt's tokens."""

    request: EngineRequest


@dataclass(frozen=True)
class TokenCount:
    """A prompt's tokens and the model's context length in tokens, each None if the engine does not know it."""

    tokens: int | None
    limit: int | None


@dataclass(frozen=True)
class ReadCall:
    """Read the words printed in an image."""

    image: CheckedImage


@dataclass(frozen=True)
class PrintedText:
    """The words printed in an image, or the error that kept them from being read."""

    text: str = ""
    error: GuardError | None = None


ModelCall: TypeAlias = GenerateCall | ScoreCall
EngineCall: TypeAlias = ModelCall | CountCall | ReadCall
EngineReply: TypeAlias = EngineResult | ScoreResult | TokenCount | PrintedText
ReplyT = TypeVar("ReplyT", EngineResult, ScoreResult, TokenCount, PrintedText)
JudgingSteps: TypeAlias = Generator[EngineCall, EngineReply, Verdict]


def call_generate(request: EngineRequest) -> Generator[EngineCall, EngineReply, EngineResult]:
    """Call the engine to generate an answer."""
    return _expect(EngineResult, (yield GenerateCall(request)))


def call_score(request: EngineRequest, slots: tuple[str, ...]) -> Generator[EngineCall, EngineReply, ScoreResult]:
    """Call the engine to compare the label words in `slots`."""
    return _expect(ScoreResult, (yield ScoreCall(request, slots)))


def call_count(request: EngineRequest) -> Generator[EngineCall, EngineReply, TokenCount]:
    """Call the engine to count the prompt's tokens."""
    return _expect(TokenCount, (yield CountCall(request)))


def call_read(image: CheckedImage) -> Generator[EngineCall, EngineReply, str]:
    """Read the words printed in `image`. Raises the `GuardError` that kept them from being read."""
    printed = _expect(PrintedText, (yield ReadCall(image)))
    if printed.error is not None:
        raise printed.error
    return printed.text


def _expect(kind: type[ReplyT], reply: EngineReply) -> ReplyT:
    if not isinstance(reply, kind):
        raise TypeError(f"expected a {kind.__name__}, got a {type(reply).__name__}")
    return reply


def build_request(exchange: Exchange, policy: Policy) -> EngineRequest:
    """The request to the model about an exchange whose images are checked (`CheckedImage`)."""
    images = tuple(image for image in exchange.all_images if isinstance(image, CheckedImage))
    return EngineRequest(build_messages(exchange), images, pixels=policy.pixels)
