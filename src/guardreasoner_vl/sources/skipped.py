"""Rows that could not be used: counted by reason, and named."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SetAside:
    """`rows` holds (name, reason) of those that were named, by id or place."""

    reasons: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, reason: str, name: str | None = None) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if name is not None:
            self.rows.append((name, reason))

    def merge(self, other: SetAside) -> None:
        """Add another count to this one."""
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.rows += other.rows

    @property
    def total(self) -> int:
        return sum(self.reasons.values())
