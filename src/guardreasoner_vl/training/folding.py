"""The normaliser of a small guard's tokenizer: it undoes disguises of letters that a reader does not notice.

A small model has seen few of the ways to write a letter. What its tokenizer folds it need not learn: compatibility
forms (full width, mathematical letters: NFKC), invisible characters, Cyrillic, Greek and Armenian letters between Latin
ones, and sentences in capitals. Words of other scripts stay as they are. A tokenizer looks for the tokens that were
added to it, such as those of the wire format, before it normalises, so that folding cannot forge one.
"""

from __future__ import annotations

from tokenizers import Regex, normalizers

from guardreasoner_vl.protocol.lookalikes import HIDDEN_ASCII, LOOKALIKES

INVISIBLE = (
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
    "\U000e0100-\U000e01ef]"
)
"""Characters without a glyph, as a regular expression: joiners, marks of direction, variation selectors, fillers."""

_REACH = 15  # letters of a word that are read ahead; without a limit a long word would take time squared
_IN_CAPITALS = 10
_MARK = "\u2060"  # is among `INVISIBLE`, so that no text holds it any more
_LATIN = (*range(0x41, 0x5B), *range(0xC0, 0x250), *range(0x1E00, 0x1F00))
_CAPITALS = [chr(code) for code in _LATIN if chr(code).isupper() and len(chr(code).lower()) == 1]
_CAPITAL = f"[{''.join(_CAPITALS)}]"
_FOREIGN = r"[\p{Cyrillic}\p{Greek}\p{Armenian}]"


def folding() -> normalizers.Normalizer:
    """A normaliser for `tokenizer.json`."""
    steps = [normalizers.NFKC(), normalizers.Replace(Regex(INVISIBLE), "")]
    steps += [normalizers.Replace(hidden, plain) for hidden, plain in HIDDEN_ASCII.items()]
    for latin, lookalikes in LOOKALIKES.items():
        for letter in lookalikes:
            # `Replace` sees its steps' results: a word's Latin letters reach from one lookalike to the next. A pattern
            # that begins with its letter is searched for twenty times as fast as one that does not.
            between_latin = rf"(?={_FOREIGN}{{0,{_REACH}}}[A-Za-z])|(?<=[A-Za-z]{letter})"
            steps.append(normalizers.Replace(Regex(f"{letter}(?:{between_latin})"), latin))
    return normalizers.Sequence([*steps, *_lower_case()])


def _lower_case() -> list[normalizers.Normalizer]:
    """Make `_IN_CAPITALS` Latin capitals in a row lower case, with at most three other signs between two of them.

    A mark is put before each of these capitals, first where enough of them follow, then one by one to the last. A mark
    and its letter become the small letter.
    """
    between = rf"[^\p{{L}}{_MARK}]"
    start = normalizers.Replace(Regex(rf"(?=(?:{_CAPITAL}{between}{{0,3}}){{{_IN_CAPITALS}}})"), _MARK)
    after = "|".join(rf"(?<={_MARK}{_CAPITAL}{between * gap})" for gap in range(4))
    rest = normalizers.Replace(Regex(rf"(?={_CAPITAL})(?:{after})"), _MARK)
    small = [normalizers.Replace(_MARK + capital, capital.lower()) for capital in _CAPITALS]
    return [start, *[rest] * (_IN_CAPITALS - 1), *small, normalizers.Replace(_MARK, "")]
