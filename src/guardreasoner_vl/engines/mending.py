"""What a server's JSON may hold and nobody can pass on: halves of characters, and numbers that JSON does not have.

JSON writes a character beyond the first 65,536 as two halves (UTF-16 surrogates). A server that cuts a text between
them sends one half in each piece.
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
    """The text with its halves of characters joined, and U+FFFD for each that stands alone."""
    if text.isascii() or not _HALF.search(text):
        return text
    return _HALF.sub(REPLACEMENT, text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass"))


def has_halves(value: Any) -> bool:
    """Whether a string or a key of the JSON holds a half of a character that stands alone."""
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
    """The JSON as it can be written again: texts mended, null for NaN and infinities. Raises `RecursionError`."""
    if isinstance(value, str):
        return mended(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {mended(name): plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list) else value


class Halves:
    """Texts that come in pieces, each at a place of its own: a half at the end of a piece waits for the next piece."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[Any, ...], str] = {}

    def join(self, place: tuple[Any, ...], text: str) -> str:
        """The piece that can be told now."""
        text = self._waiting.pop(place, "") + text
        if "\ud800" <= text[-1:] <= "\udbff":
            self._waiting[place], text = text[-1], text[:-1]
        return mended(text)

    def alone(self) -> Iterator[tuple[Any, ...]]:
        """Places, each once, whose half has not come."""
        while self._waiting:
            yield self._waiting.popitem()[0]
