"""What the judging of one exchange asks of an engine: generate, score, count; and the request that it asks with.

A judging is a generator: it yields calls, is sent the replies, and returns the verdict. It never touches an engine, so
that whoever runs it may batch the calls of many.
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
class Generate:
    """Please generate an answer. `is_window` marks one of many calls about one exchange, which can wait for others."""

    request: EngineRequest
    is_window: bool = False


@dataclass(frozen=True)
class Score:
    """Please compare the label words in these slots; `is_window` as in `Generate`."""

    request: EngineRequest
    slots: tuple[str, ...]
    is_window: bool = False


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


def generated(request: EngineRequest) -> Generator[Call, Reply, EngineResult]:
    """Ask for an answer."""
    return _as(EngineResult, (yield Generate(request)))


def scored(request: EngineRequest, slots: tuple[str, ...]) -> Generator[Call, Reply, ScoreResult]:
    """Ask for a comparison of the label words."""
    return _as(ScoreResult, (yield Score(request, slots)))


def counted(request: EngineRequest) -> Generator[Call, Reply, Counted]:
    """Ask for the number of prompt tokens."""
    return _as(Counted, (yield Count(request)))


def _as(kind: type[Asked], reply: Reply) -> Asked:
    if not isinstance(reply, kind):
        raise TypeError(f"{kind.__name__} was asked for, {type(reply).__name__} came")
    return reply


def question(exchange: Exchange, policy: Policy) -> EngineRequest:
    """What the model is asked about an exchange whose images were taken in."""
    images = tuple(image for image in exchange.all_images if isinstance(image, CheckedImage))
    return EngineRequest(build_messages(exchange), images, pixels=policy.pixels)
