"""Separates failures of the engine, where another run may succeed, from failures that the row itself causes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import EngineError, ImageError, InputError, InputTooLongError
from guardreasoner_vl.protocol import Reason

if TYPE_CHECKING:
    from guardreasoner_vl.types import VerdictError

FAULTS_IN_A_ROW = 64
"""The run stops after this many consecutive rows that the engine did not answer."""

_ROWS = {InputError.code, ImageError.code, InputTooLongError.code, "unsupported"}
_ANSWERS = {*(reason.value for reason in Reason if reason is not Reason.ENGINE), "unparsable", "no_score"}


def is_engine_fault(code: str | None) -> bool:
    """Whether the error `code` blames the engine, not the row or the model's answer, so that a retry may succeed."""
    return code is not None and code not in _ROWS and code not in _ANSWERS


@dataclass
class FaultStreak:
    """Counts consecutive rows that the engine failed to answer. `remedy` tells the user what to do."""

    remedy: str
    length: int = 0
    last: str = ""
    """The engine's last error message."""

    def add(self, error: VerdictError | None) -> None:
        """Count one row: an answer resets the streak, an error of the row itself does not change it."""
        if error is None:
            self.length = 0
        elif is_engine_fault(error.code):
            self.length, self.last = self.length + 1, error.message

    def check(self) -> None:
        """Raises `EngineError` if the streak is as long as `FAULTS_IN_A_ROW`."""
        if self.length >= FAULTS_IN_A_ROW:
            raise EngineError(f"{self.length} consecutive rows got no answer ({self.last}); {self.remedy}")
