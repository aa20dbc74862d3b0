"""User text can never become a control token or a transcript field (protocol, section 1).

One text-level function serves every engine and training alike: HTTP engines take text, trainers
tokenise raw text, and tokenizer flags miss the markers that are not flagged special.
"""

import re

_INVISIBLE = "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff"
_GAP = rf"[\s{_INVISIBLE}]*"
_GAP_IN_LINE = rf"[ \t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000{_INVISIBLE}]*"
_LINE_START = r"(?:(?<=[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029])|\A)"
_NAMES = ("image", "think", "/think", "result", "/result", "tool_call", "/tool_call")


def _any_form(character: str) -> str:
    """A class of the character's cases and full-width forms."""
    wide = {chr(ord(form) + 0xFEE0) for form in (character.lower(), character.upper()) if "!" <= form <= "~"}
    small = {"<": "\ufe64", ">": "\ufe65", ":": "\ufe55", "_": "\ufe4d"}.get(character, "")
    return "[" + re.escape(character.lower() + character.upper() + "".join(sorted(wide)) + small) + "]"


def _spaced(word: str, gap: str = _GAP) -> str:
    return gap.join(_any_form(character) for character in word if character != " ")


_OPEN, _CLOSE, _BAR = _any_form("<"), _any_form(">"), _any_form("|")
_WORD = r"[^\W]|[-.]"
_SPECIAL = rf"{_BAR}{_GAP}(?:{_WORD})(?:{_GAP}(?:{_WORD}))*{_GAP}{_BAR}"
_TAG = re.compile(
    rf"{_OPEN}(?={_GAP}(?:{_SPECIAL}|{'|'.join(_spaced(name) for name in _NAMES)}){_GAP}{_CLOSE})",
)
_FIELDS = "|".join(_spaced(field, _GAP_IN_LINE) for field in ("Human user:", "AI assistant:"))
_FIELD = re.compile(rf"{_LINE_START}(?={_GAP_IN_LINE}(?:{_FIELDS}))")


def neutralise(text: str) -> str:
    """Return `text` with every marker broken; text without markers comes back unchanged.

    The opening `<` of `<|...|>` tokens and of structural tags becomes `‹` (U+2039), a line that begins
    with a transcript field gets `| ` in front. Case, inner spaces, invisible characters and full-width
    forms do not hide a marker. Idempotent.
    """
    return _FIELD.sub("| ", _TAG.sub("\u2039", text))
