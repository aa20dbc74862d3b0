"""Reads an encoded image from a path, bytes or a `data:` URL; recognises strings that cannot be an image's path.

Error messages never quote a string that may itself be an encoded image or a judged text.
"""

from __future__ import annotations

import base64
import binascii
import errno
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.types.media import is_data_url

if TYPE_CHECKING:
    from guardreasoner_vl.types import ImageSource

_REMOTE = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_ELSEWHERE = re.compile(rf"\s*data:|{_REMOTE.pattern}", re.IGNORECASE)
_LONGEST_PART, _LONGEST_PATH = 255, 4096  # limits in bytes on all common file systems
_LONG_PART = re.compile(rf"[^/]{{{_LONGEST_PART + 1}}}")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_ENCODED_PART = re.compile(r"(?=.*[A-Z])(?=.*[a-z])(?=.*[0-9])[A-Za-z0-9+_-]{40,}={0,2}")
_ENCODED_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # PNG, JPEG, GIF, WebP
_SHORTEST_ENCODED = 12
_INLINE = "not a path: write data:image/...;base64,<data> for an image that is not a file"
_NO_PATH = "not a path: give the path of an image"
_MAX_PERCENT_ESCAPES = 1_000_000  # the standard library needs 40 bytes for each


def file_name_fault(name: str) -> str | None:
    """The reason why a string cannot be an image's path, None if it can be. Never quotes the string."""
    if _looks_encoded(name):
        return _INLINE
    if _ELSEWHERE.match(name):
        return "an address, not a path: save the image as a file"
    return _NO_PATH if "\0" in name or len(name) > _LONGEST_PATH or _LONG_PART.search(name) else None


def _looks_encoded(text: str) -> bool:
    """Whether a text is base64 without a `data:` head: it starts like an encoded image, is padded, or is long."""
    bare = "".join(text.split())
    if len(bare) < _SHORTEST_ENCODED or not _BASE64.fullmatch(bare):
        return False
    return bare.startswith(_ENCODED_STARTS) or bare.endswith("=") or len(bare) > _LONGEST_PART


def encoded_bytes(source: object, max_bytes: int) -> bytes:
    """The bytes of an image from a path, a `data:` URL or bytes. Raises `ImageError`."""
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str) and is_data_url(source):
        data = _from_data_url(source, max_bytes)
    elif isinstance(source, str) and _REMOTE.match(source):
        raise ImageError("remote images are not fetched: pass the bytes or a data: URL")
    elif isinstance(source, (str, Path)):
        data = _file_bytes(Path(source), max_bytes)
    else:
        raise ImageError(f"{type(source).__name__} is not an image: pass a path, bytes, a data: URL or a PIL image")
    _check_bytes(len(data), max_bytes)
    if not data:
        raise ImageError("the image is empty: pass a file with an image")
    return data


def in_memory(source: ImageSource, max_bytes: int) -> ImageSource:
    """The bytes of an image file; any other source as it is, since it is in memory already. Raises `ImageError`."""
    is_file = isinstance(source, Path) or (isinstance(source, str) and not is_data_url(source))
    return encoded_bytes(source, max_bytes) if is_file else source


def _check_bytes(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ImageError(f"the image has more than {max_bytes:,} bytes: shrink or compress it")


def _file_bytes(path: Path, max_bytes: int) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageError(f"{ascii(path.name or str(path))[:80]} is not a regular file: give the path of an image")
        with path.open("rb") as stream:
            return stream.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise ImageError(_why_unread(path, error)) from error


def _why_unread(path: Path, error: OSError | ValueError) -> str:
    """The reason why a file cannot be read; names the file, unless its path may be an encoded image or another text."""
    if fault := file_name_fault(str(path)):
        return fault
    if any(map(_ENCODED_PART.fullmatch, path.parts)):
        return _INLINE
    if not isinstance(error, OSError) or error.errno == errno.ENAMETOOLONG:
        return _NO_PATH
    return f"{ascii(path.name)[:80]} cannot be read ({error.strerror}): check the path and its permissions"


def _from_data_url(url: str, max_bytes: int) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma:
        raise ImageError("the data: URL has no comma: write data:image/png;base64,<data>")
    _check_bytes(len(payload) // 4, max_bytes)  # %-escaped base64, the longest encoding, has four characters per byte
    if payload.count("%") > _MAX_PERCENT_ESCAPES:
        raise ImageError("the data: URL has too many %-escapes: encode the image as base64")
    if not head.rstrip().lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    data = payload.encode().translate(None, b" \t\r\n\f")  # no %-escapes: decoders read them differently
    _check_bytes(len(data) // 4 * 3 - 2, max_bytes)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ImageError("the data: URL is not valid base64: encode the whole file, with padding and no %") from error
