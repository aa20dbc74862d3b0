"""What every engine does: chat messages and images in, text and label log-probabilities out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from guardreasoner_vl.types import ModelInfo, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guardreasoner_vl.images.geometry import PixelBudget
    from guardreasoner_vl.protocol import Message
    from guardreasoner_vl.types import CheckedImage

FinishReason = Literal["stop", "length", "error"]


class Watch(Protocol):
    """What a caller hears, from whatever thread the engine works in, of an answer; and how it is called off."""

    def begin(self) -> None:
        """An answer begins; what was told of an earlier one is void."""

    def tell(self, text: str) -> None:
        """The answer's next piece of text."""

    @property
    def called_off(self) -> bool:
        """Whether nobody waits for the answer any more."""


@dataclass(frozen=True)
class EngineRequest:
    """One question to the model.

    `forced_prefix` begins the assistant's turn; the result's text starts with it. While `label_fields`
    are generated, the log-probabilities of `candidates` after each field are read off. `ban_empty_think`
    keeps the end of think from coming before some reasoning stands. `temperature` 0 is greedy. `watch` is told the
    text as it comes, piece by piece or at once, as the engine can.
    """

    messages: tuple[Message, ...]
    images: tuple[CheckedImage, ...] = ()
    forced_prefix: str = ""
    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    label_fields: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    ban_empty_think: bool = False
    pixels: PixelBudget | None = None
    watch: Watch | None = field(default=None, compare=False)


@dataclass(frozen=True)
class EngineResult:
    """One answer. `label_logprobs` maps a field to one log-probability per candidate, where the model gives
    them, at the candidates' first differing token. On a fault `finish_reason` is `error` and `error` says why.

    `token_ids` are the text's tokens; `end_id` is the one that ended the turn, where it ended and the engine tells.
    """

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...] = ()
    end_id: int | None = None
    label_logprobs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    error: str | None = None
    error_code: str = "engine"


@dataclass(frozen=True)
class ScoreResult:
    """Log-probabilities of the candidates in each slot, and the candidate chosen there."""

    logprobs: tuple[tuple[float, ...], ...]
    chosen: tuple[int, ...]
    usage: Usage = field(default_factory=Usage)
    error: str | None = None
    error_code: str = "engine"


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do, declared and not guessed."""

    images: bool
    scores: bool
    forced_prefix: bool
    prefix_cache: bool
    max_context: int | None


class Engine(Protocol):
    """Implementations never raise for one bad request: its result carries the error, the others go on."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def count_tokens(self, request: EngineRequest) -> int | None:
        """Prompt tokens of `request`, images and forced prefix included; None where the engine cannot tell."""

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        """Answer all `requests`; results come in the same order."""

    def score(
        self, requests: Sequence[EngineRequest], slots: Sequence[str], candidates: Sequence[str]
    ) -> list[ScoreResult]:
        """Compare `candidates` in each slot after the forced prefix.

        Slot text, then the better candidate, are appended in turn: with `slots` = (a, b) the second
        comparison reads prefix + a + chosen + b.
        """

    async def agenerate(self, request: EngineRequest) -> EngineResult:
        """`generate` for one request without blocking the event loop."""

    async def ascore(self, request: EngineRequest, slots: Sequence[str], candidates: Sequence[str]) -> ScoreResult:
        """`score` for one request without blocking the event loop."""

    def close(self) -> None:
        """Free what the engine holds."""
