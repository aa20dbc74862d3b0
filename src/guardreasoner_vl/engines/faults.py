"""Tells why a row has no judgement: the engine failed, so that another run may succeed, or the row is at fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import EngineError, ImageError, InputError, InputTooLongError
from guardreasoner_vl.protocol import Reason

if TYPE_CHECKING:
    from guardreasoner_vl.types import VerdictError

FAULTS_IN_A_ROW = 64
"""After this many rows in succession without an answer the engine is taken to be gone, and the run stops."""

_ROWS = {InputError.code, ImageError.code, InputTooLongError.code, "unsupported"}
_ANSWERS = {*(reason.value for reason in Reason if reason is not Reason.ENGINE), "unparsable", "no_score"}


def is_engine_fault(code: str | None) -> bool:
    """Whether the error `code` is about neither the row nor the model's answer to it, so that asking again may help."""
    return code is not None and code not in _ROWS and code not in _ANSWERS


@dataclass
class FaultStreak:
    """Counts rows in succession that the engine failed. `remedy` tells the user what to do."""

    remedy: str
    length: int = 0
    last: str = ""
    """The engine's last error message."""

    def add(self, error: VerdictError | None) -> None:
        """Count one row: an answer ends the streak, a fault of the row itself leaves it as it is."""
        if error is None:
            self.length = 0
        elif is_engine_fault(error.code):
            self.length, self.last = self.length + 1, error.message

    def check(self) -> None:
        """Raises `EngineError` if the streak is as long as `FAULTS_IN_A_ROW`."""
        if self.length >= FAULTS_IN_A_ROW:
            raise EngineError(f"{self.length} rows one after another got no answer ({self.last}); {self.remedy}")
