"""Convert a conversation in any vendor's format to chat messages that a guard can judge (`service.parts`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from guardreasoner_vl.service.parts import UnsupportedContentError, answer_parts, parts_of, remaining_parts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guardreasoner_vl.service.parts import Part


def messages_of(conversation: Any) -> list[dict[str, Any]]:
    """Chat messages from a text, messages or items, with roles user, assistant and tool.

    A user's message may also contain tool results, as Anthropic's do. They are placed after the user's text, so that
    both belong to the turn that is judged. Raises `UnsupportedContentError`.
    """
    if isinstance(conversation, str):
        return [_message_of_parts("user", parts_of(conversation))]
    if not isinstance(conversation, (list, tuple)):
        raise UnsupportedContentError("the conversation is not a list of messages: send messages")
    return [message for item in conversation for message in _of_item(item)]


def last_user_index(messages: Sequence[Mapping[str, Any]]) -> int:
    """The index of the user's last message; -1 if there is none."""
    return max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)


def with_user_parts(messages: list[dict[str, Any]], parts: list[Part]) -> list[dict[str, Any]]:
    """The messages, with more parts from the user after the user's last message.

    They are not appended at the end: after an assistant's message they would begin a new turn, and that answer would no
    longer be judged.
    """
    index = last_user_index(messages) + 1
    return [*messages[:index], _message_of_parts("user", parts), *messages[index:]] if parts else messages


def _of_item(item: Any) -> list[dict[str, Any]]:
    if isinstance(item, str):
        return [_message_of_parts("user", parts_of(item))]
    if not isinstance(item, dict):
        raise UnsupportedContentError("a message is not an object: send role and content")
    role, kind = item.get("role"), item.get("type")
    if role in ("system", "developer"):
        return []
    if role == "assistant":
        return [_message_of_parts("assistant", answer_parts(item))]
    if role in ("tool", "function"):
        return [
            _message_of_parts("tool", [*parts_of(item.get("content")), *remaining_parts(item, ("role", "content"))])
        ]
    if role == "user":
        return _of_user(item)
    if role is not None:
        raise UnsupportedContentError("a message has an unknown role: use user, assistant or tool")
    is_from_tool = isinstance(kind, str) and kind.endswith(("_output", "_result"))
    return [_message_of_parts("tool" if is_from_tool else "assistant", parts_of(item))]


def _of_user(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = item.get("content")
    blocks = content if isinstance(content, list) else [content]
    results = [block for block in blocks if isinstance(block, dict) and block.get("type") == "tool_result"]
    words = [block for block in blocks if not (isinstance(block, dict) and block.get("type") == "tool_result")]
    parts = [*parts_of(words), *remaining_parts(item, ("role", "content"))]
    from_user = [_message_of_parts("user", parts)] if parts or not results else []
    return from_user + [_message_of_parts("tool", parts_of(result)) for result in results]


def _message_of_parts(role: str, parts: list[Part]) -> dict[str, Any]:
    return {"role": role, "content": parts}
