"""Finds the images, videos and sounds that a row or a message refers to, by key or mark, so that none is ignored."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_MEDIA = "image|img|picture|pic|photo|video|audio|sound|attachment"
_KEY = re.compile(
    rf"(?:input|user|raw)?(?:{_MEDIA})s?(?:path|file|url|uri|name|filename|byte|data|base64|b64|list|input)*s?",
    re.IGNORECASE,
)
_MARK = re.compile(r"<\s*(image|video|audio)\s*>", re.IGNORECASE)
_LEADING_MARKS = re.compile(rf"\A\s*(?:{_MARK.pattern}\s*)+", re.IGNORECASE)


def unread_medium(content: Mapping[str, object], read: Collection[str] = ()) -> str | None:
    """The first key of `content` that names a medium, has a value, and is not in `read`; None if there is none."""
    return next(
        (key for key, value in content.items() if key not in read and _names_medium(key) and _holds_something(value)),
        None,
    )


def is_data_url(text: str) -> bool:
    """Whether a text gives an image inline, instead of by its path or address."""
    return text[:5].lower() == "data:"


def marks(text: str) -> Counter[str]:
    """Count the marks `<image>`, `<video>` and `<audio>` in a text, in upper or lower case."""
    return Counter(match[1].lower() for match in _MARK.finditer(text))


def leading_marks(text: str) -> Counter[str]:
    """Count the marks at the beginning of a text."""
    match = _LEADING_MARKS.match(text)
    return marks(match[0]) if match else Counter()


def _names_medium(key: object) -> bool:
    return isinstance(key, str) and _KEY.fullmatch(re.sub(r"[\W_]+", "", key)) is not None


def _holds_something(value: object) -> bool:
    """Whether a value is not null, false, zero, NaN, empty, or a container of only such values."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_something, value))
    if isinstance(value, dict):
        return any(map(_holds_something, value.values()))
    return bool(value) and value == value
