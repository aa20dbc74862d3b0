"""Unusable rows: counted by reason, with the names of those that have one."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SkippedRows:
    """Counts by reason; `rows` has (name, reason) for each row that is identified by an id or a place."""

    reasons: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, reason: str, name: str | None = None) -> None:
        """Count one row; `name` is its id or place, if it has one."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if name is not None:
            self.rows.append((name, reason))

    def merge(self, other: SkippedRows) -> None:
        """Add the counts and names of `other`."""
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.rows += other.rows

    @property
    def total(self) -> int:
        """Number of skipped rows, named or not."""
        return sum(self.reasons.values())
