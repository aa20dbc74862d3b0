"""Allow-lists of the proxy and the middleware: request fields sent to a model, answer fields sent to a client.

A request with an unlisted field is refused and the field named; an unlisted field of an answer is dropped, and so is an
unlisted field of a request that is null or empty. The text of the user and of the model is judged. `tools`,
`response_format` and system messages are the application's own text and are not judged. Control fields hold numbers,
single words, or text that no model reads.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.engines.openai.chat_stream import CALLED, TEXTS
from guardreasoner_vl.engines.openai.mending import has_halves
from guardreasoner_vl.service.bodies import InvalidBodyError, read_json
from guardreasoner_vl.types.exchange import REASONING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    Allowed = Mapping[str, Callable[[Any], bool]]
    """For each field, the check that its value must pass."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ID = re.compile(r"[A-Za-z0-9_.:|/+=-]{1,256}")
_EXTRA = re.compile(r"(messages\.(content\.)?)?[^.]+")
_DEEPEST = 64
_LONGEST_NAME = 60
_MOST_CHOICES = 1000
OPERATORS = ("system", "developer")
"""Roles of the application's own messages, which the guard does not judge."""


def _anything(_: Any) -> bool:
    return True


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_id_value(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))  # booleans are numbers


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_name(name) and _number(part) for name, part in value.items())


def _flag_or_numbers(value: Any) -> bool:
    return all(map(_number, value)) if isinstance(value, list) else _number(value)


_NUMBERS = (
    "temperature", "top_p", "top_k", "min_p", "n", "max_tokens", "max_completion_tokens", "min_tokens", "seed",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty", "stream", "logprobs",
    "top_logprobs", "parallel_tool_calls", "store", "ignore_eos", "skip_special_tokens", "stop_token_ids",
    "include_stop_str_in_output", "include_reasoning", "priority",
)  # fmt: skip
_NOT_READ_BY_A_MODEL = (
    "model", "messages", "stop", "user", "metadata", "prompt_cache_key", "safety_identifier", "service_tier",
    "logit_bias",
)  # fmt: skip
_APPLICATION_FIELDS = ("response_format", "tools", "tool_choice", "functions", "function_call")
_BODY: Allowed = {
    **dict.fromkeys(_NUMBERS, _flag_or_numbers),
    **dict.fromkeys((*_NOT_READ_BY_A_MODEL, *_APPLICATION_FIELDS), _anything),
    **dict.fromkeys(("reasoning_effort", "verbosity"), _is_name),
    **dict.fromkeys(("stream_options", "chat_template_kwargs"), _are_numbers),
}
_MESSAGE: Allowed = {
    **dict.fromkeys(("role", "content", "tool_calls", "function_call", "refusal"), _anything),
    "name": _is_name,
    "tool_call_id": _is_id_value,
}
_ASSISTANT: Allowed = {**_MESSAGE, **dict.fromkeys(REASONING, _anything)}
_IMAGE_URL: Allowed = {"url": _anything, "detail": _is_name}
_TEXT_PART: Allowed = {"type": _anything, "text": _anything}
_IMAGE_PART: Allowed = {"type": _anything, "image_url": _anything, "detail": _is_name}
_PARTS: Mapping[str, Allowed] = {
    "text": _TEXT_PART,
    "input_text": _TEXT_PART,
    "output_text": _TEXT_PART,
    "refusal": {"type": _anything, "refusal": _anything},
    "image_url": _IMAGE_PART,
    "input_image": _IMAGE_PART,
}
"""The content parts that are judged; a part of another type is handed to the guard, which refuses it."""

_CALL: Allowed = {"id": _is_id_value, "type": _is_name, "index": _number, **dict.fromkeys(CALLED, _anything)}
_FUNCTION: Allowed = {"name": _anything, "arguments": _anything}
_CALLED: Mapping[str, Allowed] = {"function": _FUNCTION, "custom": {"name": _anything, "input": _anything}}


def check_pass_fields(names: Collection[str]) -> None:
    """Raise `ValueError` for a field that is not `NAME`, `messages.NAME` or `messages.content.NAME`."""
    for name in names:
        if not _EXTRA.fullmatch(name):
            raise ValueError(f"{_quoted_name(name)}: write NAME, messages.NAME or messages.content.NAME")


def read_chat(raw: bytes, extra: Collection[str] = ()) -> dict[str, Any]:
    """Parse a chat request and keep its allowed fields. Raises `InvalidBodyError`, which never quotes a value.

    `extra` lists more fields that pass unjudged: `NAME` of the body, `messages.NAME` and `messages.content.NAME`.
    """
    body = read_json(raw)
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise InvalidBodyError("messages: give a list of chat messages")
    if _depth(body) > _DEEPEST:
        raise InvalidBodyError(f"the body is nested more than {_DEEPEST} deep: send it flatter")
    if has_halves(body):
        raise InvalidBodyError("the body is not valid Unicode (a lone surrogate): encode it again")
    allowed = _checked_fields(body, _BODY, "", _at("", extra))
    allowed["messages"] = [_message_fields(message, index, extra) for index, message in enumerate(body["messages"])]
    return allowed


def allowed_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """The judged fields of an answer's message or delta, which may be sent. Raises one of `answers.MALFORMED`."""
    passed = {name: message[name] for name in TEXTS if name in message}
    if isinstance(passed.get("content"), list):
        passed["content"] = [_allowed_part(part) for part in passed["content"]]
    if "role" in message:
        passed = {"role": "assistant", **passed}
    if message.get("tool_calls"):
        passed["tool_calls"] = [_allowed_call(call) for call in message["tool_calls"]]
    if message.get("function_call"):
        passed["function_call"] = _only(message["function_call"], _FUNCTION)
    return passed


def allowed_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    """The index and the finish reason of a choice. Raises `ValueError` unless they are a small number and a word."""
    index, reason = choice.get("index") or 0, choice.get("finish_reason")
    if not isinstance(index, int) or not 0 <= index < _MOST_CHOICES:
        raise ValueError("a choice's index is not a small number")
    if reason is not None and not _is_name(reason):
        raise ValueError("a finish reason is not a word")
    return {"index": index, "finish_reason": reason}


def _message_fields(message: Any, index: int, extra: Collection[str]) -> dict[str, Any]:
    where = f"messages.{index}."
    if not isinstance(message, dict):
        raise InvalidBodyError(f'messages.{index}: a message is an object {{"role": ..., "content": ...}}')
    role = message.get("role")
    passed = _checked_fields(message, _ASSISTANT if role == "assistant" else _MESSAGE, where, _at("messages.", extra))
    if isinstance(message.get("content"), list):
        parts = [_part(part, where, role, _at("messages.content.", extra)) for part in message["content"]]
        passed["content"] = parts
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        passed["tool_calls"] = [_tool_call_fields(call, f"{where}tool_calls.") for call in calls]
    if isinstance(message.get("function_call"), dict):
        passed["function_call"] = _checked_fields(message["function_call"], _FUNCTION, f"{where}function_call.")
    return passed


def _part(part: Any, where: str, role: Any, extra: Collection[str]) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    allowed = _PARTS.get(kind) if isinstance(kind, str) else None
    if allowed is None:
        if role in OPERATORS:
            raise InvalidBodyError(f"{where}content: a part of this type cannot be passed on: use text or image_url")
        return part
    passed = _checked_fields(part, allowed, f"{where}content.", extra)
    if isinstance(passed.get("image_url"), dict):
        passed["image_url"] = _checked_fields(passed["image_url"], _IMAGE_URL, f"{where}content.image_url.")
    return passed


def _tool_call_fields(call: Any, where: str) -> Any:
    """The allowed fields of a tool call; a malformed call is handed to the guard, which refuses it."""
    if not isinstance(call, dict):
        return call
    passed = _checked_fields(call, _CALL, where)
    if all(passed.get(kind) for kind in CALLED):
        raise InvalidBodyError(f"{where}custom: a call has a function or a custom tool, not both")
    for kind, allowed in _CALLED.items():
        if isinstance(passed.get(kind), dict):
            passed[kind] = _checked_fields(passed[kind], allowed, f"{where}{kind}.")
    return passed


def _checked_fields(
    fields: Mapping[str, Any], allowed: Allowed, where: str, extra: Collection[str] = ()
) -> dict[str, Any]:
    passed = {}
    for name, value in fields.items():
        known = allowed.get(name)
        if name in extra or (known and (value is None or known(value))):
            passed[name] = value
        elif known:
            raise InvalidBodyError(f"{where}{name}: only {_EXPECTED[known]} passes here; change it or leave it out")
        elif value is not None and value not in ("", [], {}):
            raise InvalidBodyError(
                f"{where}{_quoted_name(name)}: it is not judged, so it is not passed on; leave it out"
                " (operators can list it in pass_fields)"
            )
    return passed


_EXPECTED: Mapping[Callable[[Any], bool], str] = {
    _is_name: "a word of letters, digits, _ and - (64 at most)",
    _is_id_value: "an id of letters, digits and signs (256 at most)",
    _number: "a number",
    _are_numbers: "an object of numbers and booleans",
    _flag_or_numbers: "a number, a boolean or a list of numbers",
}


def _at(prefix: str, extra: Collection[str]) -> Collection[str]:
    """The field names in `extra` directly below `prefix`."""
    return {name.removeprefix(prefix) for name in extra if name.rpartition(".")[0] == prefix.rstrip(".")}


def _quoted_name(name: str) -> str:
    return name if _NAME.fullmatch(name) else ascii(name[:_LONGEST_NAME])


def _depth(body: Any) -> int:
    deepest, pending = 0, [(body, 1)]
    while pending:
        part, depth = pending.pop()
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        pending += [(child, depth + 1) for child in inner]
        deepest = max(deepest, depth)
    return deepest


def _allowed_part(part: Any) -> Any:
    allowed = _PARTS.get(part["type"])
    passed = part if allowed is None else _only(part, allowed)
    if isinstance(passed.get("image_url"), dict):
        passed["image_url"] = _only(passed["image_url"], _IMAGE_URL)
    return passed


def _allowed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    passed = _only(call, _CALL)
    kinds = [kind for kind in CALLED if passed.pop(kind, None)]
    return {**passed, **{kind: _only(call[kind], _CALLED[kind]) for kind in kinds[:1]}}


def _only(fields: Mapping[str, Any], allowed: Allowed) -> dict[str, Any]:
    return {
        name: value for name, value in fields.items() if name in allowed and (value is None or allowed[name](value))
    }
