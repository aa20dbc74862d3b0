"""Repairs a server's JSON: lone surrogates, and numbers that JSON does not allow (NaN, infinities).

JSON may escape a character above U+FFFF as two halves (UTF-16 surrogates). A server that splits a text between them
sends one half in each chunk.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

REPLACEMENT = "\ufffd"
_HALF = re.compile("[\ud800-\udfff]")


def mended(text: str) -> str:
    """The text with surrogate pairs joined, and U+FFFD for each lone surrogate."""
    if text.isascii() or not _HALF.search(text):
        return text
    return _HALF.sub(REPLACEMENT, text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass"))


def has_halves(value: Any) -> bool:
    """Whether a string or a key of the JSON contains a lone surrogate."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            if not part.isascii() and _HALF.search(part):
                return True
        elif isinstance(part, dict):
            waiting += [*part, *part.values()]
        elif isinstance(part, list):
            waiting += part
    return False


def plain(value: Any) -> Any:
    """A copy that can be written as JSON: lone surrogates become U+FFFD, NaN and infinities None.

    Raises `RecursionError`.
    """
    if isinstance(value, str):
        return mended(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {mended(name): plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list) else value


class Halves:
    """Joins surrogates across the chunks of texts, one text per place: a half at a chunk's end is kept for the next."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[Any, ...], str] = {}

    def join(self, place: tuple[Any, ...], text: str) -> str:
        """The next chunk of the text at `place`: the kept half is added in front, a half at the end is kept back."""
        text = self._waiting.pop(place, "") + text
        if "\ud800" <= text[-1:] <= "\udbff":
            self._waiting[place], text = text[-1], text[:-1]
        return mended(text)

    def unpaired(self) -> Iterator[tuple[Any, ...]]:
        """The places at which a half is still kept; each is returned once."""
        while self._waiting:
            yield self._waiting.popitem()[0]
