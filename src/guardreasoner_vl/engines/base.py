"""The engine interface: chat messages and images in, text and label log-probabilities out."""

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
"""Why an answer ended: the model ended its turn, the limit of tokens was reached, or the request failed."""


class StreamListener(Protocol):
    """Callbacks for a streamed answer, called from the engine's thread, and the flag that cancels it."""

    def on_start(self) -> None:
        """Begin an answer; the listener discards the text of an earlier attempt."""

    def on_text(self, text: str) -> None:
        """Receive the next part of the answer's text."""

    @property
    def cancelled(self) -> bool:
        """Whether the caller no longer wants the answer."""


@dataclass(frozen=True)
class EngineRequest:
    """One request to the model.

    `forced_prefix` starts the assistant's turn, and the result's text starts with it. After each of `label_fields` that
    is generated, the log-probabilities of `candidates` are recorded. `ban_empty_think` forbids closing the think tag
    before any reasoning was written. `temperature` 0 is greedy. `listener` receives the text in parts as they are
    generated, or all at once if the engine cannot stream.
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
    listener: StreamListener | None = field(default=None, compare=False)


@dataclass(frozen=True)
class EngineResult:
    """One answer. `label_logprobs` maps a field to one log-probability per candidate, at the candidates' first
    differing token; a field without log-probabilities is missing. If the request failed, `finish_reason` is `error`
    and `error` says why.

    `token_ids` are the text's tokens; `end_id` is the token that ended the turn, None if unknown or not reached.
    `token_logprobs` are the log-probabilities of these tokens, that of `end_id` last, in the distribution that they
    were sampled from; empty if they were not recorded.
    """

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...] = ()
    end_id: int | None = None
    token_logprobs: tuple[float, ...] = ()
    label_logprobs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    error: str | None = None
    error_code: str = "engine"


@dataclass(frozen=True)
class ScoreResult:
    """For each slot, the candidates' log-probabilities and the index of the candidate that was chosen."""

    logprobs: tuple[tuple[float, ...], ...]
    chosen: tuple[int, ...]
    usage: Usage = field(default_factory=Usage)
    error: str | None = None
    error_code: str = "engine"


@dataclass(frozen=True)
class Capabilities:
    """What an engine supports, as the engine itself declares it."""

    images: bool
    scores: bool
    forced_prefix: bool
    prefix_cache: bool
    max_context: int | None


class Engine(Protocol):
    """Runs a model. Methods do not raise for one bad request: its result holds the error, the others are answered."""

    @property
    def model(self) -> ModelInfo:
        """The name and the revision of the model that the engine runs."""

    @property
    def capabilities(self) -> Capabilities:
        """What the engine supports with this model."""

    def count_tokens(self, request: EngineRequest) -> int | None:
        """Number of prompt tokens of `request`, images and forced prefix included; None if the engine cannot count."""

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        """Answer all `requests`; the results are in the same order."""

    def score(
        self, requests: Sequence[EngineRequest], slots: Sequence[str], candidates: Sequence[str]
    ) -> list[ScoreResult]:
        """Compare `candidates` in each slot after the forced prefix.

        For each slot, its text and then the likelier candidate are appended to the prompt: with `slots` = (a, b) the
        second comparison reads prefix + a + chosen + b.
        """

    async def agenerate(self, request: EngineRequest) -> EngineResult:
        """`generate` for one request without blocking the event loop."""

    async def ascore(self, request: EngineRequest, slots: Sequence[str], candidates: Sequence[str]) -> ScoreResult:
        """`score` for one request without blocking the event loop."""

    def close(self) -> None:
        """Release the engine's resources."""
