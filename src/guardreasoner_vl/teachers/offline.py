"""The rules teacher as a `Teacher`: deterministic, free and offline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.protocol import TargetLabel, training_target
from guardreasoner_vl.teachers.base import CannotLabelError, TeacherAnswer, Tokens, known, present
from guardreasoner_vl.teachers.lexicon import find_evidence
from guardreasoner_vl.teachers.rules import explain

if TYPE_CHECKING:
    from guardreasoner_vl.types import Sample, Target


class RulesTeacher:
    """Writes the reasoning of `rules.explain`; an unknown label is guessed from words that point to harm."""

    name = "rules"

    def estimate(self, sample: Sample) -> Tokens:  # noqa: ARG002
        """Zero: rules use no tokens."""
        return Tokens()

    async def write(self, sample: Sample, complaint: str | None) -> TeacherAnswer:  # noqa: ARG002
        """The answer, always the same for a sample."""
        request, response = _target_label(sample, "request"), _target_label(sample, "response")
        spans = training_target(explain(sample, request, response), request, response)
        return TeacherAnswer("".join(span.text for span in spans), "stop")

    async def label(self, sample: Sample) -> TeacherAnswer:  # noqa: ARG002
        """Raises `CannotLabelError`: rules explain known labels, they do not find labels."""
        raise CannotLabelError("the rules teacher cannot label rows: use --teacher openai, or curate with labels_from")

    async def aclose(self) -> None:
        """Do nothing: rules hold no connections."""


def _target_label(sample: Sample, target: Target) -> TargetLabel:
    if not present(sample)[target]:
        return TargetLabel("None")
    label = known(sample).get(target)
    if label:
        return TargetLabel(label)
    text = sample.prompt if target == "request" else sample.response or ""
    return TargetLabel("harmful" if find_evidence(text) else "unharmful", known=False)
