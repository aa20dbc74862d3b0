"""Converts another guard's judgements to a `Verdict`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.types import Judgement, Label, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guardreasoner_vl.choices import Action, Mode
    from guardreasoner_vl.types import ModelInfo, Target, Usage

_ABSENT = Judgement(label=Label.NOT_APPLICABLE)


def verdict_of(judgements: Mapping[Target, Judgement], mode: Mode, model: ModelInfo, usage: Usage) -> Verdict:
    """The verdict with these judgements; a target without one is not applicable."""
    request, response = judgements.get("request", _ABSENT), judgements.get("response", _ABSENT)
    flagged = Label.HARMFUL in (request.label, response.label)
    action: Action = "block" if flagged else "allow"
    return Verdict(
        request=request, response=response, flagged=flagged, action=action, mode=mode, model=model, usage=usage
    )


def worse(first: Judgement | None, second: Judgement) -> Judgement:
    """Merge two judgements of one target: harmful if one of them is, with the higher score."""
    if first is None:
        return second
    scores = [judgement.score for judgement in (first, second) if judgement.score is not None]
    label = Label.HARMFUL if Label.HARMFUL in (first.label, second.label) else second.label
    return Judgement(label=label, score=max(scores, default=None))
