"""What a teacher is asked about a row of a corpus, and what its answer is worth: an `Attempt`.

row with a label       reasoning, again with the reason if the gates reject it, until kept or set aside
row without any label  first `votes` labels; with a majority they are the row's labels, else it is set aside
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.corpus.attempts import FAULT, Attempt
from guardreasoner_vl.engines.openai.http import HttpError
from guardreasoner_vl.errors import GuardError, InputError
from guardreasoner_vl.protocol import parse_verdict
from guardreasoner_vl.teachers.base import CannotLabelError, known, present
from guardreasoner_vl.teachers.gates import GOLD, UNPARSABLE, Passed, gate

if TYPE_CHECKING:
    from guardreasoner_vl.corpus.attempts import Asked, RowState
    from guardreasoner_vl.teachers.base import Answered
    from guardreasoner_vl.teachers.budget import Price
    from guardreasoner_vl.types import GoldLabel, Sample, Target

NO_MAJORITY, NOTHING = "no majority", "nothing to judge"


@dataclass(frozen=True)
class Terms:
    """Who is asked, how often, and at which price."""

    teacher: str
    attempts: int = 3
    votes: int = 3
    price: Price | None = None

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.votes < 1:
            raise InputError("attempts and votes must be 1 or more")

    def labelled(self, sample: Sample, state: RowState) -> Sample | None:
        """The sample with its labels, those of the majority if it has none; None if there is no majority."""
        if known(sample):
            return sample
        found = {target: self._majority(state, target) for target, there in present(sample).items() if there}
        if not all(found.values()):
            return None
        return sample.model_copy(update={f"{target}_label": label for target, label in found.items()})

    def lacks_votes(self, sample: Sample, state: RowState) -> bool:
        """Whether the row has to be labelled before its reasoning is asked for."""
        return not known(sample) and len(state.votes) < self.votes

    def hopeless(self, sample: Sample, state: RowState) -> Attempt | None:
        """The last line about a row that reasoning cannot be asked for."""
        if not any(present(sample).values()):
            return Attempt(id=sample.id, teacher=self.teacher, reason=NOTHING, final=True)
        if not self.lacks_votes(sample, state) and self.labelled(sample, state) is None:
            return Attempt(id=sample.id, teacher=self.teacher, reason=NO_MAJORITY, final=True)
        return None

    def vote(self, sample: Sample, answered: Answered, custom_id: str | None = None) -> Attempt:
        """What one answer says about a row's labels; one outside the grammar says nothing."""
        there = present(sample)
        parsed = parse_verdict(answered.text, there["request"], there["response"], answered.finish_reason)
        return self._attempt(
            sample,
            answered,
            custom_id,
            asked="label",
            reason=f"{UNPARSABLE}{parsed.reason}" if parsed.reason else None,
            request_label=GOLD.get(parsed.request),
            response_label=GOLD.get(parsed.response),
        )

    def reasoning(self, sample: Sample, state: RowState, answered: Answered, custom_id: str | None = None) -> Attempt:
        """What the gates make of an answer about a row; rejected once too often, it is set aside."""
        row = self.labelled(sample, state) or sample
        result = gate(answered.text, row, answered.finish_reason)
        outcome = (
            {"reasoning": result.reasoning, "judged": result.judged}
            if isinstance(result, Passed)
            else {"reason": result.reason, "final": state.rejections + 1 >= self.attempts}
        )
        if row is not sample:
            labels = known(row)
            agree = {target: sum(vote.get(target) == label for vote in state.votes) for target, label in labels.items()}
            outcome |= {"votes": agree, **{f"{target}_label": label for target, label in labels.items()}}
        return self._attempt(sample, answered, custom_id, **outcome)

    def fault(self, sample: Sample, asked: Asked, error: GuardError, custom_id: str | None = None) -> Attempt:
        """No answer came. That is final only where no answer ever can: the row itself cannot be sent."""
        status = error.status if isinstance(error, HttpError) and error.code == HttpError.code else None
        return Attempt(
            id=sample.id,
            teacher=self.teacher,
            asked=asked,
            reason=f"{FAULT}{f'http {status}' if status else error.code}",
            final=isinstance(error, InputError) and not isinstance(error, CannotLabelError),
            custom_id=custom_id,
        )

    def _attempt(self, sample: Sample, answered: Answered, custom_id: str | None, **outcome: object) -> Attempt:
        return Attempt.model_validate(
            {
                "id": sample.id,
                "teacher": self.teacher,
                "prompt_tokens": answered.prompt_tokens,
                "completion_tokens": answered.completion_tokens,
                "cost": self.price.of(answered.tokens) if self.price else None,
                "custom_id": custom_id,
                **outcome,
            }
        )

    def _majority(self, state: RowState, target: Target) -> GoldLabel | None:
        """The label of more than half of all answers, unusable ones included."""
        counted = Counter(vote[target] for vote in state.votes if target in vote).most_common(1)
        return counted[0][0] if counted and 2 * counted[0][1] > max(self.votes, len(state.votes)) else None
