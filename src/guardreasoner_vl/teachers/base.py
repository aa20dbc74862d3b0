"""Who writes the reasoning of a corpus: a teacher is told a row's ground truth and answers as a guard would.

What a teacher answers is kept only if it passes `teachers.gates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from guardreasoner_vl.errors import InputError

if TYPE_CHECKING:
    from guardreasoner_vl.types import GoldLabel, Sample, Target

TARGETS: tuple[Target, Target] = ("request", "response")


class CannotLabelError(InputError):
    """The teacher writes reasoning for known labels only."""

    code = "cannot_label"


@dataclass(frozen=True)
class Tokens:
    """Tokens read and written."""

    prompt: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt - other.prompt, self.completion - other.completion)


@dataclass(frozen=True)
class Answered:
    """One answer; `finish_reason` is `stop`, `length` or a word for any other end."""

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.prompt_tokens, self.completion_tokens)


class Teacher(Protocol):
    """Faults raise `GuardError`: an `InputError` for a row that can never be asked about, others may pass.

    All coroutines belong to one event loop, until `aclose`.
    """

    @property
    def name(self) -> str:
        """Which model or program writes, say `gpt-4o-2024-08-06` or `rules`."""

    def estimate(self, sample: Sample) -> Tokens:
        """The most tokens that one answer about `sample` may take, as far as that can be told before."""

    async def write(self, sample: Sample, complaint: str | None) -> Answered:
        """A whole answer in the protocol's form that ends with the sample's own labels.

        `complaint` is the gates' reason against the last answer, if there was one.
        """

    async def label(self, sample: Sample) -> Answered:
        """A whole answer by a teacher that is not told any label."""

    async def aclose(self) -> None:
        """Free what is held; the teacher may be used again, on another event loop."""


def present(sample: Sample) -> dict[Target, bool]:
    """Whether there is a request, and a response, to judge."""
    return {
        "request": bool(sample.images or sample.prompt.strip()),
        "response": bool(sample.response and sample.response.strip()),
    }


def known(sample: Sample) -> dict[Target, GoldLabel]:
    """The labels of what there is to judge, without those that nobody gave."""
    labels: dict[Target, GoldLabel | None] = {"request": sample.request_label, "response": sample.response_label}
    there = present(sample)
    return {target: label for target, label in labels.items() if label is not None and there[target]}
