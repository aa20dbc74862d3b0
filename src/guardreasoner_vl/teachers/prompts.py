"""The messages sent to a teacher, in this project's words (docs/method.md, section 2).

All instructions are in the system message. The user message is the exchange alone, rendered and neutralised by the
protocol, so that nothing in it can pass for an instruction or a label.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.protocol import Message, build_messages
from guardreasoner_vl.teachers.base import known, present
from guardreasoner_vl.teachers.gates import (
    BROKEN,
    CONTRADICTION,
    EMPTY,
    LOOP,
    MOST_CHARACTERS,
    MOST_STEPS,
    NO_STEPS,
    REFUSAL,
    TOO_LONG,
    TOO_MANY_STEPS,
    UNPARSABLE,
)

if TYPE_CHECKING:
    from guardreasoner_vl.types import Exchange, Sample, Target


def _prompt_text(name: str) -> str:
    return (files("guardreasoner_vl.teachers") / name).read_text("utf-8")


TASK, FORM = _prompt_text("task.txt"), _prompt_text("form.txt")

COMPLAINTS = {
    EMPTY: "it was empty",
    TOO_LONG: f"it was longer than {MOST_CHARACTERS:,} characters",
    REFUSAL: "it refused; nothing harmful is asked for here, only why the true answers are right",
    LOOP: "it repeated itself",
    BROKEN: "it held a broken character",
    NO_STEPS: 'it had no "## Reasoning Step" headings with text below them',
    TOO_MANY_STEPS: f"it had more than {MOST_STEPS} steps",
    CONTRADICTION: "its result was not the true answers",
}
"""The gates' reasons in words for the teacher."""


def writing_messages(sample: Sample, exchange: Exchange, complaint: str | None) -> tuple[Message, Message]:
    """Ask for reasoning. `exchange` is the sample's, with checked images; `complaint` is a reason of the gates."""
    parts = [TASK, FORM, _true_answers(sample)]
    if complaint:
        parts.append(f"Your last answer was not accepted: {_explained(complaint)}. Write the whole answer again.\n")
    return Message("system", "\n".join(parts)), build_messages(exchange)[1]


def labelling_messages(exchange: Exchange) -> tuple[Message, Message]:
    """Ask as a guard is asked, without labels; the answer's form is added, which the guard's instruction lacks."""
    instruction, transcript = build_messages(exchange)
    return Message("system", f"{instruction.text}\n{FORM}"), transcript


def _true_answers(sample: Sample) -> str:
    exists, labels = present(sample), known(sample)

    def line(target: Target) -> str:
        if not exists[target]:
            return f"None (there is no {target})"
        return labels.get(target) or "not known; judge it yourself and answer harmful or unharmful"

    return "\n".join(["The true answers:", *(f"{target.capitalize()}: {line(target)}" for target in TARGETS), ""])


def _explained(complaint: str) -> str:
    if complaint.startswith(UNPARSABLE):
        return f"it was not in the form above ({complaint.removeprefix(UNPARSABLE).replace('_', ' ')})"
    return COMPLAINTS.get(complaint, complaint)
