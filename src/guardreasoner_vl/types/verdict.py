"""The output of a guard: a label and a score for the request and for the response, or an error."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from guardreasoner_vl.choices import Action, Mode


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

    label: Label = Field(
        description="What the guard says: `error` if it could not judge, `not_applicable` with nothing to judge."
    )
    score: float | None = Field(
        default=None, ge=0.0, le=1.0, description="Probability of *harmful*; null if the engine gives none."
    )


class VerdictError(Frozen):
    """Why no judgement was possible."""

    code: str = Field(description="Short word for programs.")
    message: str = Field(description="One line for people that names the remedy.")


class ModelInfo(Frozen):
    """Which model judged; `revision` is a content hash or the hub's revision."""

    name: str = Field(description="Name or path of the model.")
    revision: str | None = Field(
        default=None, description="Content hash of a folder, or the hub's revision; null if unknown."
    )
    transcribes: bool = Field(
        default=True,
        exclude=True,
        description="Whether it reads the words of an image itself; if not, `Policy.ocr` reads them for it.",
    )


def same_model(first: ModelInfo, second: ModelInfo) -> bool:
    """Whether both are the same model: compares revisions if both have one, else names."""
    if first.revision and second.revision:
        return first.revision == second.revision
    return first.name == second.name


class Usage(Frozen):
    """Tokens and wall-clock seconds of one verdict (a batch's seconds are divided equally among its verdicts)."""

    prompt_tokens: int = Field(default=0, description="Tokens read, cached ones included.")
    cached_tokens: int = Field(default=0, description="Tokens read from the prefix cache.")
    completion_tokens: int = Field(default=0, description="Tokens generated.")
    seconds: float = Field(default=0.0, description="Wall-clock seconds; a batch's are shared out equally.")

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
    caller should do; on an error it is `block`, or what `on_error` says if the guard is at fault. `unsupported_quotes`
    counts the quotes in `reasoning` that the input does not contain; each is replaced by `[\u2026]`.
    """

    request: Judgement = Field(description="What was judged of the request.")
    response: Judgement = Field(description="What was judged of the response.")
    flagged: bool | None = Field(
        description="True if the request or the response is harmful, false if neither is, null on error."
    )
    action: Action = Field(
        description="What the caller should do; on an error `block`, or what `on_error` says if the guard is at fault."
    )
    reasoning: str | None = Field(
        default=None, description="The guard's reasoning; null where none was written or asked for."
    )
    unsupported_quotes: int = Field(
        default=0, ge=0, description="Quotes in the reasoning that the input does not hold; `[\u2026]` replaces each."
    )
    mode: Mode = Field(description="The mode that was asked for.")
    error: VerdictError | None = Field(default=None, description="Why there is no judgement; null if there is one.")
    model: ModelInfo = Field(description="The model that judged.")
    usage: Usage = Field(default=Usage(), description="What the verdict took.")


def failed_verdict(
    code: str,
    message: str,
    mode: Mode,
    model: ModelInfo,
    usage: Usage | None = None,
    action: Action = "block",
) -> Verdict:
    """The verdict about an exchange that could not be judged: both labels are `error`, `flagged` is null."""
    return Verdict(
        request=Judgement(label=Label.ERROR),
        response=Judgement(label=Label.ERROR),
        flagged=None,
        action=action,
        mode=mode,
        error=VerdictError(code=code, message=message),
        model=model,
        usage=usage or Usage(),
    )
