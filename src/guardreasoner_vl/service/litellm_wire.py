"""LiteLLM's generic guardrail API: its JSON bodies, and their conversion to an exchange.

LiteLLM may send the same content twice: as `texts`, `images` and `tool_calls`, which name no speaker, and as
`structured_messages`, which may lack some of it. All content is judged once: content of the messages at its place, the
rest as the user's in a request and as the model's in a response. Tool definitions are the operator's and not judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from guardreasoner_vl.choices import Target
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.service.bodies import Body
from guardreasoner_vl.service.conversation import last_user_index, messages_of, with_user_parts
from guardreasoner_vl.service.parts import call_parts, is_text_in, parts_of, texts_of
from guardreasoner_vl.service.wire import Messages, build_exchange, url_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from guardreasoner_vl.service.parts import Part
    from guardreasoner_vl.service.wire import Fetch
    from guardreasoner_vl.types import Exchange


class LiteLLMRequest(Body):
    """The request of LiteLLM's generic guardrail. Unknown fields are ignored, since new versions add some."""

    input_type: Target = Field(description="Whether a request or a response is to be judged.")
    texts: list[str] | None = Field(default=None, description="Texts of unnamed speakers.")
    images: list[str] | None = Field(default=None, description="`data:` URLs, or addresses that the operator lists.")
    tool_calls: list[dict[str, Any]] | None = Field(default=None, description="Calls that the model made.")
    structured_messages: Messages | None = None

    @model_validator(mode="after")
    def _images_have_addresses(self) -> Self:
        for part in _image_blocks(self.structured_messages or ()):
            if not isinstance(url_of(part), str):
                raise ValueError("structured_messages: the url of an image is not a string; send a data: URL")
        return self

    async def exchange(self, fetch: Fetch) -> Exchange:
        """All content as one exchange. Raises `InputError`, also if there is nothing to judge."""
        messages = merge_inputs(self.input_type, self.structured_messages, self.texts, self.images, self.tool_calls)
        return await build_exchange(messages, fetch)


class LiteLLMResponse(BaseModel):
    """The response to LiteLLM. `action` is always sent, since LiteLLM reads a missing one as NONE."""

    action: Literal["BLOCKED", "NONE"] = Field(description="What LiteLLM does.")
    blocked_reason: str | None = Field(default=None, description="One line without content; null if allowed.")


def merge_inputs(
    input_type: Target,
    messages: Sequence[dict[str, Any]] | None = None,
    texts: Sequence[str] | None = None,
    images: Sequence[str] | None = None,
    tool_calls: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The messages, with the texts, images and calls that they lack added to the last turn.

    Raises `InputError` for a response without an answer, since only its request would be judged.
    """
    system_texts = [text for message in messages or () for text in _system_texts(message)]
    conversation = messages_of(messages or ())
    last = last_user_index(conversation)
    # An answer that repeats its question is still judged as an answer.
    searched = conversation if input_type == "request" else conversation[last + 1 :]
    known_parts = [part for message in searched for part in message["content"]]
    known_texts = [*texts_of(known_parts), *(system_texts if input_type == "request" else ())]

    def lacking(parts: Iterable[Part]) -> list[Part]:
        return [part for part in parts if part not in known_parts and not is_text_in(part, known_texts)]

    missing = lacking(parts_of([*(texts or ()), *({"type": "image", "url": url} for url in images or ())]))
    calls = lacking(part for call in tool_calls or () for part in call_parts(call))
    if input_type == "response":
        if not (known_parts or missing or calls):
            raise InputError("there is no answer to judge: send texts, images, tool_calls or an assistant's message")
        return [*conversation, {"role": "assistant", "content": [*missing, *calls]}]
    conversation = with_user_parts(conversation, missing)
    return [*conversation, {"role": "assistant", "content": calls}] if calls else conversation


def _system_texts(message: Mapping[str, Any]) -> list[str]:
    """The texts of a system message, which LiteLLM repeats in `texts`."""
    return texts_of(parts_of(message.get("content"))) if message.get("role") in ("system", "developer") else []


def _image_blocks(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and "image_url" in part:
                yield part
