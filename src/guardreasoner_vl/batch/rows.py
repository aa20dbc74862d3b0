"""Reads the rows of a batch: `{id, prompt?, images?, response?}` or `{id, messages}`, one a line.

An ambiguous or malformed line is rejected with its number and the reason, and stops nothing.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.images.encoded import file_name_fault
from guardreasoner_vl.storage.jsonl_log import MAX_LINE
from guardreasoner_vl.types.media import unread_medium

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from guardreasoner_vl.batch.output import RowId

_JUDGED = ("prompt", "images", "response", "messages")
_FIELDS = ("id", *_JUDGED)
_NOT_A_PATH = re.compile(r"data:|\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_MISSPELT = 0.85  # a similarity in [0, 1]: `image` and `images` are about as similar


@dataclass(frozen=True)
class BatchRow:
    """One valid line of IN; `item` is passed to the guard, `ignored` names the fields that are not judged.

    `digest` has 16 hexadecimal digits and stands for the judged fields; of an image file it covers the path alone.
    """

    line: int
    id: RowId
    item: dict[str, Any]
    digest: str
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class RejectedLine:
    """An input line that was rejected: malformed, without an id, or with an id seen before."""

    line: int
    reason: str


def read_batch_rows(lines: Iterable[bytes], folder: Path) -> Iterator[BatchRow | RejectedLine]:
    """Yield the rows of a JSONL file and its rejected lines; image paths are relative to `folder`, blank lines skipped.

    Ambiguous lines are rejected.
    """
    first_lines: dict[RowId, int] = {}
    for number, line in enumerate(lines, 1):
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not content.strip():
            continue
        try:
            row = _row_of_line(number, content, folder)
            first = first_lines.setdefault(row.id, number)
            if first != number:
                raise InputError(f"line {first} has the same id: give each row its own id")
        except InputError as error:
            yield RejectedLine(number, str(error))
        else:
            yield row


def _row_of_line(number: int, line: bytes, folder: Path) -> BatchRow:
    content = _parse_object(line)
    row_id = content.get("id")
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int)) or row_id == "":
        raise InputError("no id: give each row an id, a string or an integer")
    if isinstance(row_id, str) and not row_id.isascii() and row_id.encode("utf-8", "replace").decode() != row_id:
        raise InputError("the id is not valid Unicode: give another one")
    ignored = tuple(name for name in content if name not in _FIELDS)
    for name in ignored:
        similar = difflib.get_close_matches(name.lower(), _FIELDS, n=1, cutoff=_MISSPELT)
        if similar:
            raise InputError(f"field {name!a:.40}: did you mean {similar[0]!r}? Rename or remove it")
    if medium := unread_medium(content, _FIELDS):
        raise InputError(f"field {medium!a:.40}: this medium cannot be judged; give images in 'images', or remove it")
    item = {name: content[name] for name in _JUDGED if content.get(name) not in (None, "", [])}
    try:
        digest = hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()[:16]
    except RecursionError as error:
        raise InputError("nested too deeply: write plain messages") from error
    if isinstance(item.get("images"), list):
        item["images"] = [_image_source(image, folder) for image in item["images"]]
    return BatchRow(number, row_id, item, digest, ignored)


def _parse_object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise InputError(f"longer than {MAX_LINE:,} bytes: give images as paths")
    try:
        content = json.loads(line.decode("utf-8"), object_pairs_hook=_unambiguous)
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8: save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError("not JSON: write one JSON object on each line") from error
    if not isinstance(content, dict):
        raise InputError("not a JSON object: write {...} with an id")
    return content


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise InputError("an object has a key twice: JSON parsers differ on which one they use; remove one")
    return content


def _image_source(image: Any, folder: Path) -> Any:
    is_path = isinstance(image, str) and not _NOT_A_PATH.match(image) and file_name_fault(image) is None
    return folder / image if is_path else image
