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
from guardreasoner_vl.service.conversation import last_user, messages_of, said_beside
from guardreasoner_vl.service.parts import called_parts, parts_of, texts_of
from guardreasoner_vl.service.wire import Messages, exchange_of, url_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from guardreasoner_vl.service.parts import Part
    from guardreasoner_vl.service.wire import Fetch
    from guardreasoner_vl.types import Exchange

InputType = Literal["request", "response"]


class LiteLLMRequest(Body):
    """What LiteLLM's generic guardrail sends; unknown fields are left alone, for it adds some with each version."""

    input_type: InputType
    texts: list[str] | None = None
    images: list[str] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    structured_messages: Messages | None = None

    @model_validator(mode="after")
    def _images_have_addresses(self) -> Self:
        for part in _images(self.structured_messages or ()):
            if not isinstance(url_of(part), str):
                raise ValueError("structured_messages: the url of an image is not a string")
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
    """The messages, and at their last turn whatever they lack of the texts, images and calls.

    Raises `InputError` for a response without an answer: the verdict would be about its request alone.
    """
    operators = [text for message in messages or () for text in _operators_texts(message)]
    said = messages_of(messages or ())
    last = last_user(said)
    # An answer may repeat what its question says, and then it is still to be judged as an answer.
    holding = said if input_type == "request" else said[last + 1 :]
    held = [part for message in holding for part in message["content"]]
    known = [*texts_of(held), *(operators if input_type == "request" else ())]

    def lacking(parts: Iterable[Part]) -> list[Part]:
        return [part for part in parts if part not in held and not _is_text_in(part, known)]

    shown = lacking(parts_of([*(texts or ()), *({"type": "image", "url": url} for url in images or ())]))
    calls = lacking(part for call in tool_calls or () for part in called_parts(call))
    if input_type == "response":
        if not (held or shown or calls):
            raise InputError("there is no answer to judge: send texts, images, tool_calls or an assistant's message")
        return [*said, {"role": "assistant", "content": [*shown, *calls]}]
    said = said_beside(said, shown)
    return [*said, {"role": "assistant", "content": calls}] if calls else said


def _is_text_in(part: Part, known: Sequence[str]) -> bool:
    return part["type"] == "text" and any(part["text"] in text for text in known)


def _operators_texts(message: Mapping[str, Any]) -> list[str]:
    """Texts of a system message, which LiteLLM lists among `texts` too."""
    return texts_of(parts_of(message.get("content"))) if message.get("role") in ("system", "developer") else []


def _images(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and "image_url" in part:
                yield part
