"""The output of a guard: a label and a score for the request and for the response, or an error."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Mode = Literal["slow", "fast", "hybrid"]
MODES: tuple[Mode, ...] = ("slow", "fast", "hybrid")


class Label(StrEnum):
    """The label of a request or a response. A failure to judge is `error`, never `unharmful`."""

    HARMFUL = "harmful"
    UNHARMFUL = "unharmful"
    ERROR = "error"
    NOT_APPLICABLE = "not_applicable"


class Frozen(BaseModel):
    """Immutable record that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Judgement(Frozen):
    """One label; `score` is the probability of *harmful* in [0, 1], or null if the engine gives none."""

    label: Label
    score: float | None = Field(default=None, ge=0.0, le=1.0)


class VerdictError(Frozen):
    """Why no judgement was possible."""

    code: str
    message: str


class ModelInfo(Frozen):
    """Which model judged; `revision` is a content hash or the hub's revision."""

    name: str
    revision: str | None = None


def same_model(first: ModelInfo, second: ModelInfo) -> bool:
    """Whether both are the same model: compares revisions if both have one, else names."""
    if first.revision and second.revision:
        return first.revision == second.revision
    return first.name == second.name


class Usage(Frozen):
    """Tokens and wall-clock seconds of one verdict (a batch's seconds are divided equally among its verdicts)."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            seconds=self.seconds + other.seconds,
        )


class Verdict(Frozen):
    """The guard's answer about one exchange.

    `flagged` is true if the request or the response is harmful, null on an error, else false. `action` is what the
    caller should do; on an error it follows the `on_error` policy. `unsupported_quotes` counts the quotes in
    `reasoning` that the input does not contain; each is replaced by `[\u2026]`.
    """

    request: Judgement
    response: Judgement
    flagged: bool | None
    action: Literal["allow", "block"]
    reasoning: str | None = None
    unsupported_quotes: int = Field(default=0, ge=0)
    mode: Mode
    error: VerdictError | None = None
    model: ModelInfo
    usage: Usage = Usage()
