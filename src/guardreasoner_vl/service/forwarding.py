"""Rewrite the messages of a chat request so that the guard and the model behind it read the same.

The guard joins the text parts of a message with line breaks, while chat templates concatenate them: adjacent text parts
become one part, joined with line breaks. Decoders of `data:` URLs ignore different characters: each image becomes plain
base64 of the bytes that are judged, with the media type of their signature.
"""

from __future__ import annotations

import base64
from itertools import groupby
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.decode import file_ending
from guardreasoner_vl.images.encoded import encoded_bytes
from guardreasoner_vl.service.chat_fields import OPERATORS
from guardreasoner_vl.service.wire import url_of, with_url
from guardreasoner_vl.types.exchange import TEXT_PARTS
from guardreasoner_vl.types.media import is_data_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def as_forwarded(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages to judge and to send. Texts of operators stay as they are.

    What cannot be judged, such as a broken image, stays too: judging reports it.
    """
    return [_forwarded_message(message) for message in messages]


def _forwarded_message(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [_plain_image(part) for part in content]
    return {**message, "content": parts if message.get("role") in OPERATORS else list(_merge_texts(parts))}


def _merge_texts(parts: Sequence[Any]) -> Iterator[Any]:
    for is_text, run in groupby(parts, lambda part: _part_text(part) is not None):
        adjacent = list(run)
        if is_text and len(adjacent) > 1:
            yield _one_text(adjacent)
        else:
            yield from adjacent


def _one_text(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One text part; of fields that the operator passes on and that differ, the last part's value is kept."""
    fields = {name: value for part in parts for name, value in part.items() if name != "refusal"}
    return {**fields, "type": "text", "text": "\n".join(_part_text(part) or "" for part in parts)}


def _part_text(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("refusal" if kind == "refusal" else "text") if kind in TEXT_PARTS else None
    return text if isinstance(text, str) else None


def _plain_image(part: Any) -> Any:
    url = url_of(part) if isinstance(part, dict) else None
    return with_url(part, _plain_url(url)) if isinstance(url, str) and is_data_url(url) else part


def _plain_url(url: str) -> str:
    try:
        data = encoded_bytes(url, max_bytes=len(url))  # never fewer than the bytes; judging applies the real limit
    except ImageError:
        return url
    media_type = f"image/{ending[1:]}" if (ending := file_ending(data)) else "application/octet-stream"
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
