"""The words that the rules teacher quotes from a text: a few consecutive words around the telling one, verbatim.

"how to make a bomb at home"  ->  make a bomb        from the verb before the telling word
"how to kill a python process" -> kill a python      to its object, if no verb comes before
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.teachers.lexicon import Evidence

_WORD = re.compile(r"[A-Za-z][A-Za-z'-]{0,19}")
_RUN = re.compile(rf"(?<![^\s\"'(\[*]){_WORD.pattern}(?: {_WORD.pattern})*(?![^\s.,;:!?\"')\]*])")
_BETWEEN = re.compile(
    "a|an|the|my|your|his|her|its|our|their|some|any|this|that|these|those|all|more",
    re.IGNORECASE,
)
_EDGES = re.compile(
    "i|you|he|she|it|we|they|me|him|us|them|who|which|what|where|when|why|how|to|of|in|on|at|by|for|from|with|into|as"
    "|and|or|but|if|so|than|then|because|is|are|was|were|be|been|am|do|does|did|can|could|will|would|shall|should|may"
    "|might|must|not|no|have|has|had|about|without|just|also|very|there|here|please|u",
    re.IGNORECASE,
)
_REACH = 2
_ASCII_BYTES, _OTHER_BYTES, _MOST_BYTES = 1, 4, 56


def telling_words(text: str, evidence: Evidence, most: int) -> str | None:
    """At most `most` consecutive plain words around the evidence; None if the evidence is not a plain word."""
    for run in _RUN.finditer(text):
        if not run.start() <= evidence.start < run.end():
            continue
        places = [(match.start() + run.start(), match[0]) for match in _WORD.finditer(run[0])]
        words = [word for _, word in places]
        at = next((i for i, (start, word) in enumerate(places) if start <= evidence.start < start + len(word)), None)
        return None if at is None else " ".join(_around(words, at, most))
    return None


def first_words(text: str, most: int) -> str:
    """At most `most` first words, bounded in token cost, without quotation marks."""
    kept: list[str] = []
    cost = 0
    for word in text.replace('"', " ").split()[:most]:
        cost += sum(_ASCII_BYTES if character.isascii() else _OTHER_BYTES for character in word)
        if cost > _MOST_BYTES:
            return " ".join(kept) if kept else word[: _MOST_BYTES // _OTHER_BYTES]
        kept.append(word)
    return " ".join(kept)


def _around(words: Sequence[str], at: int, most: int) -> Sequence[str]:
    before, after = _steps(words[:at][::-1]), _steps(words[at + 1 :])
    if before + 1 + after > most:
        after = 0
    return words[at - min(before, most - 1) : at + 1 + after]


def _steps(words: Sequence[str]) -> int:
    """Distance in words to the next content word; 0 if it is too far or a function word is in between."""
    for steps, word in enumerate(words[:_REACH], 1):
        if _EDGES.fullmatch(word):
            return 0
        if not _BETWEEN.fullmatch(word):
            return steps
    return 0
