"""LiteLLM's generic guardrail API: the shapes on the wire, and what of them is judged.

LiteLLM says what was said up to three times: as `texts`, `images` and `tool_calls`, which name no speaker, and as
`structured_messages`, which may lack some of it. All of it is judged, once: what the messages hold where they hold it,
the rest as the user's in a request and as the model's in a response. Definitions of tools are the operator's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, model_validator

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.service.bodies import Body
from guardreasoner_vl.service.wire import Messages, exchange_of, url_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from guardreasoner_vl.service.wire import Fetch
    from guardreasoner_vl.types import Exchange

InputType = Literal["request", "response"]
_OPERATORS = ("system", "developer")


class LiteLLMRequest(Body):
    """What LiteLLM's generic guardrail sends; unknown fields are left alone, for it adds some with each version."""

    input_type: InputType
    texts: list[str] | None = None
    images: list[str] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    structured_messages: Messages | None = None

    @model_validator(mode="after")
    def _pictures_have_addresses(self) -> Self:
        for part in _parts(self.structured_messages or ()):
            if "image_url" in part and not isinstance(url_of(part), str):
                raise ValueError("structured_messages: the url of a picture is not a string")
        return self

    async def exchange(self, fetch: Fetch) -> Exchange:
        """All that was sent as one exchange. Raises `InputError`, also where nothing is to be judged."""
        messages = united(self.input_type, self.structured_messages, self.texts, self.images, self.tool_calls)
        return await exchange_of(messages, fetch)


class LiteLLMResponse(BaseModel):
    """LiteLLM takes a missing action for NONE, so there is always one."""

    action: Literal["BLOCKED", "NONE"]
    blocked_reason: str | None = None


def united(
    input_type: InputType,
    messages: Sequence[dict[str, Any]] | None = None,
    texts: Sequence[str] | None = None,
    images: Sequence[str] | None = None,
    tool_calls: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The messages, and at their last turn whatever they lack of the texts, pictures and calls.

    Raises `InputError` for a response without an answer: the verdict would be about its request alone.
    """
    messages = list(messages or ())
    last = _last_user(messages)
    # An answer may repeat what its question says, and then it is still to be judged as an answer.
    holding = messages if input_type == "request" else messages[last + 1 :]
    strings = list(_strings(holding))
    urls = {url_of(part) for part in _parts(holding) if isinstance(url_of(part), str)}
    lacking: list[dict[str, Any]] = [
        {"type": "text", "text": text} for text in texts or () if not any(text in held for held in strings)
    ]
    lacking += [{"type": "image_url", "image_url": {"url": url}} for url in images or () if url not in urls]
    held_calls = [_named(call) for message in holding for call in _calls_of(message)]
    calls = [_function(call) for call in tool_calls or () if _named(call) not in held_calls]
    if input_type == "response":
        if lacking or calls:
            return [*messages, {"role": "assistant", "content": lacking, "tool_calls": calls}]
        if not (strings or urls or held_calls):
            raise InputError("there is no answer to judge: send texts, images, tool_calls or an assistant's message")
        return messages
    if lacking:
        # Not at the end: after an assistant's words it would begin a new turn, and theirs were not judged any more.
        messages.insert(last + 1, {"role": "user", "content": lacking})
    return [*messages, {"role": "assistant", "tool_calls": calls}] if calls else messages


def _last_user(messages: Sequence[Mapping[str, Any]]) -> int:
    """Where the last message of the user stands; -1 if there is none."""
    return max((place for place, message in enumerate(messages) if message.get("role") == "user"), default=-1)


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                yield part


def _strings(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The texts of all messages, the operator's too: those are in `texts` as well, and are not to be judged."""
    for message in messages:
        if isinstance(message.get("content"), str):
            yield message["content"]
    for part in _parts(messages):
        for name in ("text", "refusal"):
            if isinstance(part.get(name), str):
                yield part[name]


def _calls_of(message: Mapping[str, Any]) -> list[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) and message.get("role") not in _OPERATORS else []


def _named(call: Any) -> Any:
    """What a call says, to compare it with another."""
    function = call.get("function") or call.get("custom") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    return function.get("name"), function.get("arguments") or function.get("input")


def _function(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with what a piece of a stream lacks left out: null stands for a name that came before."""
    kinds = {kind: call[kind] for kind in ("function", "custom") if isinstance(call.get(kind), dict)}
    if not kinds:
        return dict(call)
    return {
        kind: {name: value for name, value in called.items() if value is not None} for kind, called in kinds.items()
    }
