"""Prevents user text from becoming a control token or a transcript field (docs/protocol.md, section 1).

One function on texts serves all engines and training: HTTP engines accept only text, trainers tokenise raw text, and
tokenizer flags miss markers that are not special tokens.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING

from guardreasoner_vl.protocol.lookalikes import HIDDEN_ASCII, LOOKALIKES

if TYPE_CHECKING:
    from collections.abc import Sequence

_LINE_BREAKS = frozenset("\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
# Default-ignorable or blank characters that are neither spaces nor in a category that `_plain_character` drops whole.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
_NAMES: tuple[str, ...] = ("image", "video", "audio", "think", "/think", "result", "/result", "tool_call", "/tool_call")
# Control tokens of SmolLM2's vocabulary, from which the embedded guard's is made.
_NAMES += ("repo_name", "reponame", "file_sep", "filename", "gh_stars", "issue_start", "issue_comment", "issue_closed")
_NAMES += ("jupyter_start", "jupyter_text", "jupyter_code", "jupyter_output", "jupyter_script", "empty_output")
_FIELDS = ("human user:", "ai assistant:")


def _spaced(words: tuple[str, ...], gap: str) -> str:
    return "|".join(gap.join(re.escape(character) for character in word if character != " ") for word in words)


_TAG_NAMES, _FIELD_NAMES = _spaced(_NAMES, r"\s*"), _spaced(_FIELDS, " *")
# Both match folded text. No two adjacent repetitions can match the same character, so both run in linear time.
_TAG = re.compile(rf"<(?=\s*(?:\|\s*[\w.\-][\w.\-\s]*\||{_TAG_NAMES})\s*>)")
_FIELD = re.compile(rf"^(?= *(?:{_FIELD_NAMES}))", re.MULTILINE)
_SIMPLE = re.compile(r"[\n -~]*")
"""Text in which only upper case can hide a marker."""

_LATIN = str.maketrans({letter: latin for latin, letters in LOOKALIKES.items() for letter in letters})
_HIDDEN = re.compile(f"[{''.join(HIDDEN_ASCII)}]")


def _plain_character(character: str) -> str:
    if character in _LINE_BREAKS:
        return "\n"
    if character.isspace():
        return " "
    category = unicodedata.category(character)
    if category in ("Cc", "Cf", "Cs") or _BLANK.match(character):
        return ""
    # Normalising a text may join a mark to the letter before it: it counts as part of a word.
    return "_" if category.startswith("M") else character


@lru_cache(maxsize=65536)
def _folded_character(character: str) -> str:
    """A character after NFKC normalisation, lower-casing and removal of invisible characters.

    A letter that looks like a Latin one becomes that, a mark becomes `_`.
    """
    return "".join(
        _plain_character(form) for form in unicodedata.normalize("NFKC", character).translate(_LATIN).lower()
    )


def neutralise(text: str) -> str:
    """Return `text` with every marker broken; text without markers is returned unchanged.

    The opening `<` of `<|...|>` tokens and of structural tags becomes `‹` (U+2039), and a line that starts with a
    transcript field is prefixed with `| `. Markers are also found in other case, with inner spaces or invisible
    characters, in compatibility forms (full width, mathematical, ligatures: all that NFKC folds), in letters that look
    like Latin ones, and in tag characters, which some tokenizers drop and some read. Idempotent.
    """
    if _SIMPLE.fullmatch(text):
        return _broken(text, text.lower())
    before = None
    while text != before:
        before = text
        text = _broken(text, [_folded_character(character) for character in text])
        if _HIDDEN.search(text):
            text = _broken(text, [_folded_character(HIDDEN_ASCII.get(character, character)) for character in text])
    return text


def _broken(text: str, forms: Sequence[str]) -> str:
    """`text` with the markers broken that stand in `forms`, the reading of each of its characters."""
    folded = "".join(forms)
    tags = [match.start() for match in _TAG.finditer(folded)]
    fields = [match.start() for match in _FIELD.finditer(folded)]
    if not (tags or fields):
        return text
    origin = [index for index, form in enumerate(forms) for _ in form]
    out = list(text)
    for start in tags:
        out[origin[start]] = "\u2039"
    for start in fields:
        first = origin[start - 1] + 1 if start else 0
        out[first] = "| " + out[first]
    return "".join(out)
