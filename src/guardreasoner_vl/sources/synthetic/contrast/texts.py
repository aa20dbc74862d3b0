"""The texts of `sources.synthetic.contrast`, read from the YAML files in `texts/`.

Files of the same `language` are merged. A group has `harmless` lines and `harmful` lines by category, with `slots` for
both. A line is one pattern: a sentence if it ends with punctuation, else a verb phrase that is put in a frame (`verb`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field

from guardreasoner_vl.types import Frozen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guardreasoner_vl.types import GoldLabel

Words = tuple[str, ...]
ENDS = (".", "?", "!", "。", "？", "！", "।", "؟", ";")


class LineGroup(Frozen):
    """Lines on one subject, with good `answers` to the harmless lines, and `bad_answers` by category of harm.

    Without `framed`, lines are used without a frame. `stealth`: a phrase of secrecy leaves harmless lines harmless.
    """

    kind: str
    slots: dict[str, Words] = Field(default_factory=dict)
    harmless: Words = ()
    harmful: dict[str, Words] = Field(default_factory=dict)
    answers: Words = ()
    bad_answers: dict[str, Words] = Field(default_factory=dict)
    framed: bool = True
    stealth: bool = False


class Language(Frozen):
    """All texts of one language: sentences around requests, groups of requests, parts of answers.

    `verb`, `lead_verb` and `refuse_verb` hold `{x}` for a verb phrase, `sentence` for a sentence. `support` and
    `comply` are keyed by the request's taxonomy category (`any` for the others), `worse` by the answer's category.
    `before` has sentences of a story before a request, `space` separates sentences, and `contractions` are string
    replacements after slots are filled.
    """

    language: str
    space: str = " "
    slots: dict[str, Words]
    groups: tuple[LineGroup, ...]
    contractions: dict[str, str] = Field(default_factory=dict)
    verb: Words
    sentence: Words
    before: Words
    tail: Words = ()
    stealth: Words = ()
    open: Words
    lead: Words
    lead_verb: Words = ()
    steps: Words
    close: Words
    answer: Words
    refuse: Words
    refuse_verb: Words = ()
    turn: Words
    over_refuse: Words
    support: dict[str, Words]
    comply: dict[str, Words]
    worse: dict[str, Words]


@dataclass(frozen=True)
class Line:
    """One pattern: its text with slots, and its category of harm (empty for a harmless one)."""

    text: str
    category: str
    group: LineGroup

    @property
    def label(self) -> GoldLabel:
        """`harmful` for a line with a category."""
        return "harmful" if self.category else "unharmful"

    @property
    def is_sentence(self) -> bool:
        """Whether the line stands alone or in a `sentence` frame; if not, it is a verb phrase."""
        return not self.group.framed or self.text.endswith(ENDS)


@cache
def languages() -> dict[str, Language]:
    """All languages by code, sorted by code."""
    merged: dict[str, dict[str, Any]] = {}
    folder = files("guardreasoner_vl.sources.synthetic.contrast") / "texts"
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.endswith(".yaml"):
            document = yaml.safe_load(path.read_text("utf-8"))
            _merge(merged.setdefault(document["language"], {}), document)
    return {code: Language.model_validate(merged[code]) for code in sorted(merged)}


def _merge(into: dict[str, Any], document: Mapping[str, Any]) -> None:
    for key, value in document.items():
        if isinstance(value, list):
            into[key] = [*into.get(key, []), *value]
        elif isinstance(value, dict):
            into[key] = {**into.get(key, {}), **value}
        else:
            into[key] = value


@cache
def lines(language: str) -> dict[str, dict[str, tuple[Line, ...]]]:
    """The lines of a language: kind -> label -> lines."""
    kinds: dict[str, dict[str, list[Line]]] = {}
    for group in languages()[language].groups:
        labels = kinds.setdefault(group.kind, {"harmful": [], "unharmful": []})
        labels["unharmful"] += [Line(text, "", group) for text in group.harmless]
        for category, texts in group.harmful.items():
            labels["harmful"] += [Line(text, category, group) for text in texts]
    return {kind: {label: tuple(rows) for label, rows in labels.items()} for kind, labels in kinds.items()}
