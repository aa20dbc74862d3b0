"""Convert message content of any vendor's format to the `text` and `image_url` parts that a guard can judge.

Reads OpenAI's chat messages and Responses items, Anthropic's blocks and LangChain's. Content of no known form
(reasoning, citations, calls and results of built-in tools, a vendor's own fields) is judged as JSON. Ids, caching
marks, token log-probabilities and ciphertext that only its vendor can read are left out. Content that is neither text
nor image (audio, video, files, references) raises `UnsupportedContentError`: it is refused, never passed.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.types.exchange import REASONING
from guardreasoner_vl.types.media import is_data_url

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Part = dict[str, Any]
_TEXTS = {
    **dict.fromkeys(("text", "input_text", "output_text", "summary_text", "reasoning_text", "text-plain"), "text"),
    "refusal": "refusal",
    "thinking": "thinking",
    "reasoning": "reasoning",
}
"""For each type of block, the field with its text."""

_IMAGES = ("image", "image_url", "input_image", "output_image", "computer_screenshot")
_CALLS = ("tool_use", "function_call", "custom_tool_call", "tool_call", "invalid_tool_call", "tool_call_chunk")
_CONTAINERS = ("message", "reasoning", "tool_result", "document", "search_result")
_UNSEEN = (
    *("audio", "input_audio", "output_audio", "video", "video_url", "input_video", "file", "input_file", "media"),
    *("container_upload", "item_reference"),
)
"""Types of blocks that a guard of texts and images cannot read."""

_OPAQUE = ("signature", "thought_signature", "thoughtSignature", "encrypted_content", "encrypted_index")
_UNSAID = ("cache_control", "logprobs", "top_logprobs", "obfuscation")
"""Fields that no model reads."""

_IDS = ("id", "call_id", "tool_use_id", "tool_call_id", "item_id", "index", "status")
_NOTHING: tuple[Any, ...] = (None, "", {}, [])
_ID = re.compile(r"[\w.:|/+=-]{1,256}", re.ASCII)
_CIPHERTEXT = re.compile(r"[A-Za-z0-9+/_=.-]{64,}")
_MEDIA = re.compile(r"data:(?!image/).*|[A-Za-z0-9+/_\r\n-]{512,}={0,2}\s*", re.DOTALL)
"""Encoded bytes: `data:` URLs other than images, and long base64 without spaces."""
_DEEPEST = 64


class UnsupportedContentError(InputError):
    """Content that a guard of texts and images cannot judge."""

    code = "unreadable"


def parts_of(value: Any) -> list[Part]:
    """The `text` and `image_url` parts of a text, a block or a list of them. Raises `UnsupportedContentError`."""
    _check_depth(value)
    return _parts_of_value(value)


def _parts_of_value(value: Any, known: tuple[str, ...] = ()) -> list[Part]:
    """The parts; a string that occurs in `known` is judged already, and left out unless it is a block's own text."""
    if value is None:
        return []
    if isinstance(value, str):
        return [_part_of_text(value)] if value else []
    if isinstance(value, (list, tuple)):
        return [part for block in value for part in _parts_of_value(block, known)]
    if not isinstance(value, dict):
        return _as_json(value, known)
    return _block(value, known)


def _block(value: Mapping[str, Any], known: tuple[str, ...]) -> list[Part]:
    kind = value.get("type")
    _check_seen(value)
    if kind in _IMAGES:
        return _image_parts(value)
    if kind in _CALLS:
        return call_parts(value)
    if kind == "image_generation_call" and isinstance(value.get("result"), str):
        return [*_image_parts({"data": value["result"]}), *remaining_parts(value, ("result",), known)]
    if kind == "redacted_thinking":
        return _as_json(readable_fields({"encrypted_content": value.get("data")}), known)
    field = _TEXTS.get(kind) if isinstance(kind, str) else None
    if field is not None and isinstance(value.get(field), str):
        return [*_parts_of_value(value[field]), *remaining_parts(value, (field,), (*known, value[field]))]
    if isinstance(kind, str) and (kind in _CONTAINERS or kind.endswith("_call_output")):
        return _container(value, known)
    if kind == "text-plain":
        raise UnsupportedContentError("a text file cannot be judged: send its text")
    return _as_json(value, known)


def answer_parts(message: Mapping[str, Any]) -> list[Part]:
    """All parts of an assistant's message: reasoning, content, calls and any other field."""
    _check_depth(message)
    if message.get("audio") is not None:
        raise UnsupportedContentError("audio cannot be judged: use text and images")
    parts = [part for name in (*REASONING, "content", "refusal") for part in _parts_of_value(message.get(name))]
    parts += [part for image in _listed(message, "images") for part in _image_parts(image)]
    calls = [*_listed(message, "tool_calls"), *_listed(message, "invalid_tool_calls")]
    legacy = message.get("function_call")
    for call in [*calls, *([] if legacy is None else [{"function": legacy}])]:
        # Some vendors repeat a call in the content.
        parts += [part for part in call_parts(call) if part not in parts]
    return parts + remaining_parts(message, _OF_A_MESSAGE, texts_of(parts))


def is_text_in(part: Part, texts: Iterable[str]) -> bool:
    """Whether one of the texts contains the text of this part."""
    return part["type"] == "text" and any(part["text"] in text for text in texts)


def texts_of(parts: Iterable[Part]) -> list[str]:
    """The texts of the text parts."""
    return [part["text"] for part in parts if part["type"] == "text"]


def call_parts(call: Any) -> list[Part]:
    """A tool call, or a piece of one, as the text `name(arguments)`, and its other fields.

    Raises `UnsupportedContentError`.
    """
    fields = call if isinstance(call, dict) else {}
    kinds = [fields[kind] for kind in _CALLED if fields.get(kind) is not None]
    parts = []
    for inner in kinds or [fields]:
        if not isinstance(inner, dict) or not inner.keys() & {"name", *_ARGUMENTS}:
            raise UnsupportedContentError("a tool call names no function: send name and arguments")
        values = [inner[field] for field in _ARGUMENTS if inner.get(field) is not None]
        name, *arguments = [
            value if isinstance(value, str) else _json_text(value) for value in (inner.get("name") or "", *values)
        ]
        parts.append(_part_of_text(f"{name}({' '.join(arguments)})"))
        parts += remaining_parts(inner, ("name", *_ARGUMENTS))
    return parts + (remaining_parts(fields, _CALLED) if kinds else [])


_CALLED = ("function", "custom")
_ARGUMENTS = ("arguments", "input", "args")
_OF_A_MESSAGE = (
    *("role", "content", "refusal", "images", "tool_calls", "invalid_tool_calls", "function_call", "audio"),
    *REASONING,
)


def _container(block: Mapping[str, Any], known: tuple[str, ...]) -> list[Part]:
    """The parts of a block that contains other blocks."""
    parts = [part for name in ("summary", "content", "output") for part in _parts_of_value(block.get(name), known)]
    left_out = ["role", "summary", "content", "output", "is_error"]
    source = block.get("source")
    if isinstance(source, dict):
        if source.get("type") not in ("text", "content"):
            raise UnsupportedContentError("a document cannot be judged: send its text")
        parts += _parts_of_value(source.get("data") or source.get("content"), known)
        left_out.append("source")
    return parts + remaining_parts(block, left_out, (*known, *texts_of(parts)))


def _check_seen(value: Mapping[str, Any]) -> None:
    kind = value.get("type")
    if kind in _UNSEEN:
        raise UnsupportedContentError(f"{kind} cannot be judged: use text and images")


def _image_parts(block: Any) -> list[Part]:
    """The images of a block of any vendor, and its other fields. Raises `UnsupportedContentError` for a file id."""
    fields = block if isinstance(block, dict) else {}
    sources = [fields, *(fields[name] for name in ("source", "image_url") if isinstance(fields.get(name), dict))]
    addresses = [source.get(name) for source in sources for name in ("image_url", "url")]
    encoded = [source[name] for source in sources for name in ("base64", "data") if isinstance(source.get(name), str)]
    urls = [url for url in addresses if isinstance(url, str) and url]
    urls += [text if is_data_url(text) else f"data:;base64,{text}" for text in encoded if text]
    if not urls:
        raise UnsupportedContentError("an image cannot be judged without its bytes: send a data: URL")
    rest = [part for source in sources for part in remaining_parts(source, _OF_AN_IMAGE)]
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), *rest]


_OF_AN_IMAGE = (
    *("image_url", "url", "source", "base64", "data", "detail", "format"),
    *("mime_type", "mimeType", "media_type", "source_type"),
)


def remaining_parts(fields: Mapping[str, Any], left_out: Iterable[str], known: Iterable[str] = ()) -> list[Part]:
    """The other fields of a block or message, as parts. Raises `UnsupportedContentError`."""
    _check_depth(fields)
    rest = {name: value for name, value in fields.items() if name != "type" and name not in left_out}
    return _as_json(rest, known)


def _as_json(value: Any, known: Iterable[str]) -> list[Part]:
    images: list[Part] = []
    rest = _rest(value, tuple(known), images)
    return [
        *([] if rest in _NOTHING else [_part_of_text(rest if isinstance(rest, str) else _json_text(rest))]),
        *images,
    ]


def _rest(value: Any, known: Sequence[str], images: list[Part]) -> Any:
    """The value without the `known` texts and without its images, which are appended to `images`."""
    if isinstance(value, str):
        if value[:11].lower() == "data:image/":
            images += _image_parts({"url": value})
            return None
        if _MEDIA.fullmatch(value):
            raise UnsupportedContentError("encoded bytes cannot be judged: use text and images")
        return value if value and not any(value in text for text in known) else None
    if isinstance(value, dict):
        _check_seen(value)
        if value.get("type") in _IMAGES:
            images += _image_parts(value)
            return None
        inner = {name: _rest(part, known, images) for name, part in readable_fields(value).items()}
        kept = {name: part for name, part in inner.items() if part not in _NOTHING}
        return None if kept.keys() <= {"type"} and _is_id(kept.get("type")) else kept
    if isinstance(value, (list, tuple)):
        return [part for part in (_rest(each, known, images) for each in value) if part not in _NOTHING]
    return value


def readable_fields(value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without ids and without those that only their vendor reads."""
    return {
        name: part
        for name, part in value.items()
        if name not in _UNSAID
        and not (name in _OPAQUE and isinstance(part, str) and _CIPHERTEXT.fullmatch(part))
        and not (name in _IDS and _is_id(part))
    }


def _is_id(value: Any) -> bool:
    return value is None or isinstance(value, int) or (isinstance(value, str) and _ID.fullmatch(value) is not None)


def _listed(message: Mapping[str, Any], name: str) -> list[Any]:
    value = message.get(name)
    if value is not None and not isinstance(value, (list, tuple)):
        raise UnsupportedContentError(f"{name} is not a list: send a list")
    return list(value or ())


def _check_depth(value: Any) -> None:
    """Refuse deep nesting, without recursion; the recursive functions of this module are then safe."""
    pending = [(value, 1)]
    while pending:
        part, depth = pending.pop()
        if depth > _DEEPEST:
            raise UnsupportedContentError(f"the content is nested more than {_DEEPEST} deep: send it flatter")
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
        pending += [(child, depth + 1) for child in inner]


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedContentError(
            f"a value of type {type(value).__name__} is not JSON and cannot be judged: send JSON values"
        ) from error


def _part_of_text(text: str) -> Part:
    return {"type": "text", "text": text}
