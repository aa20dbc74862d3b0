"""The engine calls that judging one exchange needs (generate, score, count), and the request that they send.

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


EngineCall: TypeAlias = GenerateCall | ScoreCall | CountCall
EngineReply: TypeAlias = EngineResult | ScoreResult | TokenCount
ReplyT = TypeVar("ReplyT", EngineResult, ScoreResult, TokenCount)
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


def _expect(kind: type[ReplyT], reply: EngineReply) -> ReplyT:
    if not isinstance(reply, kind):
        raise TypeError(f"expected a {kind.__name__}, got a {type(reply).__name__}")
    return reply


def build_request(exchange: Exchange, policy: Policy) -> EngineRequest:
    """The request to the model about an exchange whose images are checked (`CheckedImage`)."""
    images = tuple(image for image in exchange.all_images if isinstance(image, CheckedImage))
    return EngineRequest(build_messages(exchange), images, pixels=policy.pixels)
