"""Checks the quotes in a guard's reasoning against its input, and removes quotes that the input does not contain.

A quote is enclosed by two quotation marks in one paragraph; a quote that is never closed ends with its line. White
space, case, typographic forms, invisible characters and the changes of `neutralise` are ignored. If there is an image
and the model is known to copy its words correctly, nothing is checked, because the image may contain any words.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.protocol.messages import Message

DROPPED = "[\u2026]"
"""Replaces an unsupported quote."""

_DOUBLE = {
    '"': '"',
    "\u201c": "\u201d",
    "\u201d": "\u201d",
    "\u201e": "\u201c\u201d",
    "\u00ab": "\u00bb",
    "\u300c": "\u300d",
    "\u300e": "\u300f",
    "\uff02": "\uff02",
}
_SINGLE = {"'": "'", "\u2018": "\u2019", "\u201a": "\u2018\u2019", "`": "`"}
"""Opening marks and the marks that close them. A single mark may be an apostrophe: a quote in single marks must end on
its line."""

_LONGEST_SINGLE = 300
"""Largest number of characters between single marks, so that an apostrophe delays little text."""

_CLOSING = {mark: re.compile(f"[{closing}]") for mark, closing in (_DOUBLE | _SINGLE).items()}
_MARK = re.compile(f"[{''.join(_CLOSING)}]")
_NOT_AFTER_A_LETTER = {*_SINGLE, '"', "\uff02", "\u201d"}
"""Marks that do not open a quote after a letter or digit: they close one, are an apostrophe, or mean inches."""

_TAG = r"</?(?:think|result)>"
_LINE_END = re.compile(rf"\n|{_TAG}")
_PARAGRAPH_END = re.compile(rf"\n[ \t\r]*(?:\n|#)|{_TAG}")
_EDGE = "\0"
_EDGES = " .,;:!?()[]{}*_#\"'-<>\u300c\u300d\u300e\u300f"
_SAME = str.maketrans(
    {"|": " "}
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"')
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u00b4`", "'")
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
    | {"\u2039": "<", "\u203a": ">"}
)
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")


class QuoteFilter:
    """Passes on streamed reasoning, and withholds each quote until it is closed and found in `messages`.

    With `any_words` every quote passes; `dropped` counts the removed quotes.
    """

    def __init__(self, messages: Sequence[Message], any_words: bool = False) -> None:
        self.dropped = 0
        self._messages, self._unchecked = messages, any_words
        self._read: str | None = None
        self._held, self._before = "", ""

    def whole(self, text: str) -> str:
        """Filter a complete reasoning."""
        return self.add(text) + self.finish()

    def add(self, text: str) -> str:
        """Add text; returns the text that may be shown now."""
        if self._unchecked:
            return text
        self._held += text
        return self._passed(last=False)

    def finish(self) -> str:
        """Return the withheld text at the end of the reasoning."""
        return self._passed(last=True)

    def _passed(self, last: bool) -> str:
        passed: list[str] = []
        at = 0
        while (mark := self._opening(at, last)) is not None:
            end, is_quote = self._end(mark, last)
            if end is None:
                break
            passed.append(self._held[at:mark])
            passed.append(self._checked(self._held[mark:end]) if is_quote else self._held[mark:end])
            at = end
        stop = len(self._held) if mark is None else mark
        passed.append(self._held[at:stop])
        self._before = self._held[stop - 1 : stop] or self._before
        self._held = self._held[stop:]
        return "".join(passed)

    def _opening(self, start: int, last: bool) -> int | None:
        """Where the next quote may start: not inside a word, and for a single mark not before a space."""
        for match in _MARK.finditer(self._held, start):
            at = match.start()
            before = self._held[at - 1] if at else self._before
            if match[0] in _NOT_AFTER_A_LETTER and _is_letter(before):
                continue
            after = self._held[at + 1 : at + 2]
            if match[0] in _SINGLE and (after.isspace() or (last and not after)):
                continue
            return at
        return None

    def _end(self, mark: int, last: bool) -> tuple[int | None, bool]:
        """The end of the quote that opens at `mark`, None if not yet known; and whether it is a quote at all."""
        closing = _CLOSING[self._held[mark]]
        if self._held[mark] in _SINGLE:
            return self._single_end(mark, closing, last)
        closed = closing.search(self._held, mark + 1)
        stop = _PARAGRAPH_END.search(self._held, mark + 1, closed.start() if closed else len(self._held))
        if closed and not stop:
            return closed.end(), True
        if not stop and not last:
            return None, False
        line = _LINE_END.search(self._held, mark + 1)
        return line.start() if line else len(self._held), True

    def _single_end(self, mark: int, closing: re.Pattern[str], last: bool) -> tuple[int | None, bool]:
        farthest = mark + _LONGEST_SINGLE
        stop = _LINE_END.search(self._held, mark + 1, farthest)
        for closed in closing.finditer(self._held, mark + 1, stop.start() if stop else farthest):
            after = self._held[closed.end() : closed.end() + 1]
            if not _is_letter(after):
                return (closed.end(), True) if after or last else (None, False)
        if stop or last or len(self._held) >= farthest:
            return mark + 1, False
        return None, False

    def _checked(self, quote: str) -> str:
        if self._read is None:
            self._read = _marked(_folded_text("\n".join(message.text for message in self._messages)))
        if _stands_in(quote, self._read):
            return quote
        self.dropped += 1
        return DROPPED


def _stands_in(quote: str, read: str) -> bool:
    """Whether `read`, whose words are marked, contains the quote's parts between ellipses, in order."""
    at = 0
    for part in _folded_text(quote).split("..."):
        words = _marked(part.strip(_EDGES))
        at = read.find(words, at)
        if at < 0:
            return False
        at += len(words)
    return True


def _marked(text: str) -> str:
    """The text with a mark at both ends of each run of letters, so that a search finds only whole words."""
    runs = ((is_word, "".join(run)) for is_word, run in groupby(text, _is_letter))
    return "".join(f"{_EDGE}{run}{_EDGE}" if is_word else run for is_word, run in runs)


def _is_letter(character: str) -> bool:
    """Whether the character is a digit or a cased letter; caseless scripts, such as Chinese, do not separate words."""
    return character.islower() or character.isupper() or character.isdigit()


def _folded_text(text: str) -> str:
    plain = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold()
    return " ".join(plain.translate(_SAME).split())
