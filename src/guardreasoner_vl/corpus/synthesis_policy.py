"""The policy of synthesis: what a teacher is asked about a row, and how an answer becomes an `Attempt`.

row with a label       ask for reasoning; repeat with the gates' reason until it is kept or the row is skipped
row without any label  ask for `votes` labels; a majority gives the row's labels, else the row is skipped
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.corpus.attempts import FAULT, Attempt
from guardreasoner_vl.engines.openai.http import REFUSED, HttpError
from guardreasoner_vl.errors import GuardError, InputError
from guardreasoner_vl.protocol import parse_verdict
from guardreasoner_vl.teachers.base import CannotLabelError, known, present
from guardreasoner_vl.teachers.gates import GOLD, UNPARSABLE, PassedAnswer, gate

if TYPE_CHECKING:
    from guardreasoner_vl.corpus.attempts import Asked, RowState
    from guardreasoner_vl.teachers.base import TeacherAnswer
    from guardreasoner_vl.teachers.budget import Price
    from guardreasoner_vl.types import GoldLabel, Sample, Target

NO_MAJORITY, NOTHING = "no majority", "nothing to judge"


@dataclass(frozen=True)
class SynthesisPolicy:
    """The teacher's name, the attempts and votes per row, and the price (None if unknown)."""

    teacher: str
    attempts: int = 3
    votes: int = 3
    price: Price | None = None

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.votes < 1:
            raise InputError(f"attempts is {self.attempts}, votes is {self.votes}: give 1 or more of each")

    def with_majority_labels(self, sample: Sample, state: RowState) -> Sample | None:
        """The sample, with majority labels if it has none; None without a majority."""
        if known(sample):
            return sample
        majority = {target: self._majority(state, target) for target, exists in present(sample).items() if exists}
        if not all(majority.values()):
            return None
        return sample.model_copy(update={f"{target}_label": label for target, label in majority.items()})

    def needs_votes(self, sample: Sample, state: RowState) -> bool:
        """Whether the row needs more label votes before its reasoning is asked for."""
        return not known(sample) and len(state.votes) < self.votes

    def terminal_attempt(self, sample: Sample, state: RowState) -> Attempt | None:
        """The final attempt of a row without anything to judge or without a majority; None for other rows."""
        if not any(present(sample).values()):
            return Attempt(id=sample.id, teacher=self.teacher, reason=NOTHING, final=True)
        if not self.needs_votes(sample, state) and self.with_majority_labels(sample, state) is None:
            return Attempt(id=sample.id, teacher=self.teacher, reason=NO_MAJORITY, final=True)
        return None

    def vote(self, sample: Sample, answered: TeacherAnswer, custom_id: str | None = None) -> Attempt:
        """One answer as a label vote; an answer outside the grammar votes for nothing."""
        exists = present(sample)
        parsed = parse_verdict(answered.text, exists["request"], exists["response"], answered.finish_reason)
        return self._attempt(
            sample,
            answered,
            custom_id,
            asked="label",
            reason=f"{UNPARSABLE}{parsed.reason}" if parsed.reason else None,
            request_label=GOLD.get(parsed.request),
            response_label=GOLD.get(parsed.response),
        )

    def reasoning(
        self, sample: Sample, state: RowState, answered: TeacherAnswer, custom_id: str | None = None
    ) -> Attempt:
        """One answer with reasoning, after the gates; the last allowed rejection is final."""
        row = self.with_majority_labels(sample, state) or sample
        result = gate(answered.text, row, answered.finish_reason)
        outcome = (
            {"reasoning": result.reasoning, "judged": result.judged}
            if isinstance(result, PassedAnswer)
            else {"reason": result.reason, "final": state.rejections + 1 >= self.attempts}
        )
        if row is not sample:
            labels = known(row)
            agree = {target: sum(vote.get(target) == label for vote in state.votes) for target, label in labels.items()}
            outcome |= {"votes": agree, **{f"{target}_label": label for target, label in labels.items()}}
        return self._attempt(sample, answered, custom_id, **outcome)

    def fault(self, sample: Sample, kind: Asked, error: GuardError, custom_id: str | None = None) -> Attempt:
        """An attempt of this kind without an answer; final only if the row itself can never be sent."""
        status = error.status if isinstance(error, HttpError) and error.code in (HttpError.code, REFUSED) else None
        return Attempt(
            id=sample.id,
            teacher=self.teacher,
            asked=kind,
            reason=f"{FAULT}{f'http {status}' if status else error.code}",
            final=isinstance(error, InputError) and not isinstance(error, CannotLabelError),
            custom_id=custom_id,
        )

    def _attempt(self, sample: Sample, answered: TeacherAnswer, custom_id: str | None, **outcome: object) -> Attempt:
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
        """The label of more than half of all answers, unusable answers included; None without one."""
        counted = Counter(vote[target] for vote in state.votes if target in vote).most_common(1)
        return counted[0][0] if counted and 2 * counted[0][1] > max(self.votes, len(state.votes)) else None
