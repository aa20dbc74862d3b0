"""From another guard's judgements to a verdict of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.types import Judgement, Label, Verdict, VerdictError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guardreasoner_vl.errors import GuardError
    from guardreasoner_vl.judging.policy import Action
    from guardreasoner_vl.types import Mode, ModelInfo, Target, Usage

_ABSENT = Judgement(label=Label.NOT_APPLICABLE)
_ERROR = Judgement(label=Label.ERROR)


def verdict_of(found: Mapping[Target, Judgement], mode: Mode, model: ModelInfo, usage: Usage) -> Verdict:
    """What was judged; a target that the guard said nothing about is not applicable."""
    request, response = found.get("request", _ABSENT), found.get("response", _ABSENT)
    flagged = Label.HARMFUL in (request.label, response.label)
    action: Action = "block" if flagged else "allow"
    return Verdict(
        request=request, response=response, flagged=flagged, action=action, mode=mode, model=model, usage=usage
    )


def failure(error: GuardError, mode: Mode, model: ModelInfo, usage: Usage) -> Verdict:
    """Why nothing was judged: both labels are errors, and the action is to block."""
    told = VerdictError(code=error.code, message=str(error))
    return Verdict(
        request=_ERROR, response=_ERROR, flagged=None, action="block", mode=mode, error=told, model=model, usage=usage
    )


def worse(first: Judgement | None, second: Judgement) -> Judgement:
    """Of two judgements about one target the harmful one counts, with the higher score."""
    if first is None:
        return second
    scores = [one.score for one in (first, second) if one.score is not None]
    label = Label.HARMFUL if Label.HARMFUL in (first.label, second.label) else second.label
    return Judgement(label=label, score=max(scores, default=None))
