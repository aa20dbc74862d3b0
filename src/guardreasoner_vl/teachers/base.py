"""The interface of teachers: given a row's ground truth, a teacher writes reasoning as a guard would.

A teacher's answer is kept only if it passes `teachers.gates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from guardreasoner_vl.errors import InputError

if TYPE_CHECKING:
    from guardreasoner_vl.types import GoldLabel, Sample, Target


class CannotLabelError(InputError):
    """The teacher can explain known labels, but cannot label rows."""

    code = "cannot_label"


@dataclass(frozen=True)
class Tokens:
    """Prompt tokens read and completion tokens written."""

    prompt: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt + self.completion

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt - other.prompt, self.completion - other.completion)


@dataclass(frozen=True)
class TeacherAnswer:
    """One answer of a teacher; `finish_reason` is `stop`, `length` or the server's word for another end."""

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> Tokens:
        """The tokens of the request and the answer."""
        return Tokens(self.prompt_tokens, self.completion_tokens)


class Teacher(Protocol):
    """A writer of reasoning. An `InputError` is permanent for a row; any other `GuardError` may be temporary.

    All coroutines must run on one event loop, until `aclose`.
    """

    @property
    def name(self) -> str:
        """The model or program, for instance `gpt-4o-2024-08-06` or `rules`."""

    def estimate(self, sample: Sample) -> Tokens:
        """Upper estimate of the tokens of one request about `sample` and its answer."""

    async def write(self, sample: Sample, complaint: str | None) -> TeacherAnswer:
        """A whole answer in the protocol's form that ends with the sample's labels.

        `complaint` is the reason why the gates rejected the previous answer, None for the first one.
        """

    async def label(self, sample: Sample) -> TeacherAnswer:
        """A whole answer by a teacher that is given no label."""

    async def aclose(self) -> None:
        """Release connections; the teacher may be used again, also on another event loop."""


def present(sample: Sample) -> dict[Target, bool]:
    """Whether the sample has a request, and a response."""
    return {"request": sample.has_request, "response": sample.has_response}


def known(sample: Sample) -> dict[Target, GoldLabel]:
    """The known labels of the parts that the sample has."""
    labels: dict[Target, GoldLabel | None] = {"request": sample.request_label, "response": sample.response_label}
    exists = present(sample)
    return {target: label for target, label in labels.items() if label is not None and exists[target]}
