"""A conversation in the form of any vendor as chat messages that a guard can judge (`service.parts`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from guardreasoner_vl.service.parts import UnseenError, answer_parts, beside, parts_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guardreasoner_vl.service.parts import Part


def messages_of(given: Any) -> list[dict[str, Any]]:
    """Chat messages out of a text, messages or items; those of tools come as such. Raises `UnseenError`.

    A message may hold results of tools beside a user's words, as Anthropic's do. They follow the words, so that both
    belong to the turn that is judged.
    """
    if isinstance(given, str):
        return [_message("user", parts_of(given))]
    if not isinstance(given, (list, tuple)):
        raise UnseenError("what was said is no list of messages: send messages")
    return [made for item in given for made in _of_item(item)]


def last_user(messages: Sequence[Mapping[str, Any]]) -> int:
    """Where the last message of the user stands; -1 if there is none."""
    return max((place for place, message in enumerate(messages) if message["role"] == "user"), default=-1)


def said_beside(messages: list[dict[str, Any]], parts: list[Part]) -> list[dict[str, Any]]:
    """The messages, with more that the user says in their last turn.

    Not at the end: after an assistant's words it would begin a new turn, and theirs were not judged any more.
    """
    place = last_user(messages) + 1
    return [*messages[:place], _message("user", parts), *messages[place:]] if parts else messages


def _of_item(item: Any) -> list[dict[str, Any]]:
    if isinstance(item, str):
        return [_message("user", parts_of(item))]
    if not isinstance(item, dict):
        raise UnseenError("a message is no object: send role and content")
    role, kind = item.get("role"), item.get("type")
    if role in ("system", "developer"):
        return []
    if role == "assistant":
        return [_message("assistant", answer_parts(item))]
    if role in ("tool", "function"):
        return [_message("tool", [*parts_of(item.get("content")), *beside(item, ("role", "content"))])]
    if role == "user":
        return _of_user(item)
    if role is not None:
        raise UnseenError("a message has an unknown role: use user, assistant or tool")
    said_by_tool = isinstance(kind, str) and kind.endswith(("_output", "_result"))
    return [_message("tool" if said_by_tool else "assistant", parts_of(item))]


def _of_user(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = item.get("content")
    blocks = content if isinstance(content, list) else [content]
    results = [block for block in blocks if isinstance(block, dict) and block.get("type") == "tool_result"]
    words = [block for block in blocks if not (isinstance(block, dict) and block.get("type") == "tool_result")]
    parts = [*parts_of(words), *beside(item, ("role", "content"))]
    made = [_message("user", parts)] if parts or not results else []
    return made + [_message("tool", parts_of(result)) for result in results]


def _message(role: str, parts: list[Part]) -> dict[str, Any]:
    return {"role": role, "content": parts}
