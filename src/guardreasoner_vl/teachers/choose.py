"""Choose a teacher by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.teachers.offline import RulesTeacher
from guardreasoner_vl.teachers.openai import DEFAULT_URL, Chat, OpenAITeacher

if TYPE_CHECKING:
    from guardreasoner_vl.choices import TeacherName
    from guardreasoner_vl.teachers.base import Teacher


def open_teacher(
    name: TeacherName,
    model: str,
    base_url: str | None,
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
) -> Teacher:
    """The offline rules, or `model` at an OpenAI-compatible `base_url` (default: OpenAI's)."""
    if name == "rules":
        return RulesTeacher()
    return OpenAITeacher(
        Chat(model),
        base_url=base_url or DEFAULT_URL,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )
