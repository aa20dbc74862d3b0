"""Whose fault it is that a row has no judgement: the engine's, which another run may mend, or the row's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import EngineError, ImageError, InputError, InputTooLongError
from guardreasoner_vl.protocol import Reason

if TYPE_CHECKING:
    from guardreasoner_vl.types import VerdictError

FAULTS_IN_A_ROW = 64
"""This many rows without an answer, and none with one between them: the engine is gone, the run stops."""

_ROWS = {InputError.code, ImageError.code, InputTooLongError.code, "unsupported"}
_ANSWERS = {*(reason.value for reason in Reason if reason is not Reason.ENGINE), "unparsable", "no_score"}


def is_engines(code: str | None) -> bool:
    """Whether the error `code` says nothing of the row, nor of the model's answer to it: it is worth asking again."""
    return code is not None and code not in _ROWS and code not in _ANSWERS


@dataclass
class FaultStreak:
    """Rows one after another that the engine failed. `remedy` is what the user shall do about it."""

    remedy: str
    length: int = 0
    last: str = ""
    """What the engine said last."""

    def add(self, error: VerdictError | None) -> None:
        """Count one row: without an error it was answered, and a fault of the row's own neither adds nor ends."""
        if error is None:
            self.length = 0
        elif is_engines(error.code):
            self.length, self.last = self.length + 1, error.message

    def check(self) -> None:
        """Raises `EngineError` if no other row can be expected to fare better."""
        if self.length >= FAULTS_IN_A_ROW:
            raise EngineError(f"{self.length} rows one after another got no answer ({self.last}); {self.remedy}")
