"""The shapes that requests and answers have on the wire, and how they become exchanges.

Images are `data:` URLs. Addresses are fetched only where the operator listed their hosts (`service.fetch`), and a
name that could be a file's is never opened: whoever sends a request may not read the server's disk.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from guardreasoner_vl.errors import ImageError, InputError
from guardreasoner_vl.service.bodies import Body
from guardreasoner_vl.types import Exchange, Mode, Verdict

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from guardreasoner_vl.types import Judgement

    Fetch = Callable[[str], Awaitable[bytes]]

Messages = Annotated[list[dict[str, Any]], Field(description="OpenAI-style chat messages; the last turn is judged.")]
MOST_INPUTS = 128
_STOCK_MODELS = ("omni-moderation", "text-moderation")
"""What clients of OpenAI's moderation send unasked; the default guard answers for it."""


class GuardRequest(Body):
    """One exchange: prompt, images and response, or whole messages."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"prompt": "How do I bake bread?"},
                {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
            ]
        },
    )

    prompt: str | None = None
    images: list[str] = Field(default_factory=list, description="data: URLs")
    response: str | None = None
    messages: Messages | None = None
    guard: str | None = Field(default=None, description="which of the service's guards; the default one if left out")
    mode: Mode | None = None
    include_reasoning: bool = False

    async def exchange(self, fetch: Fetch) -> Exchange:
        """Raises `InputError`."""
        if self.messages is not None:
            if self.prompt is not None or self.response is not None or self.images:
                raise InputError("give either messages or prompt, images and response, not both")
            return await exchange_of(self.messages, fetch)
        return Exchange(self.prompt, tuple([await image(url, fetch) for url in self.images]), self.response)


class ModerationRequest(Body):
    """OpenAI's moderation request; `messages` is ours, for its shape has no assistant."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": "How do I bake bread?"},
                {"input": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": ""}}]},
            ]
        }
    )

    input: str | list[str] | list[dict[str, Any]] | None = None
    messages: Messages | None = None
    model: str | None = None
    mode: Mode | None = None
    include_reasoning: bool = False

    @property
    def guard(self) -> str | None:
        return None if self.model and self.model.startswith(_STOCK_MODELS) else self.model

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either input or messages")
        if isinstance(self.input, list) and len(self.input) > MOST_INPUTS:
            raise ValueError(f"at most {MOST_INPUTS} inputs at once")
        return self

    @property
    def conversations(self) -> list[list[dict[str, Any]]]:
        """What is judged, each for itself: a string, each string of a list, all parts together, or the messages."""
        if self.messages is not None:
            return [self.messages]
        inputs = [self.input] if isinstance(self.input, str) else self.input or []
        texts: list[Any] = [one for one in inputs if isinstance(one, str)]
        return [[{"role": "user", "content": content}] for content in texts or [inputs]]

    def exchanges(self, fetch: Fetch) -> list[Awaitable[Exchange]]:
        """Each of which raises `InputError` when it is awaited."""
        return [exchange_of(messages, fetch) for messages in self.conversations]


class Moderation(BaseModel):
    """One result in OpenAI's shape. Its own 13 categories are not made up; `verdict` says all there is to say."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float | None]
    category_applied_input_types: dict[str, list[str]]
    verdict: Verdict


class ModerationResponse(BaseModel):
    """OpenAI's moderation answer."""

    id: str
    model: str
    results: list[Moderation]


async def exchange_of(messages: Sequence[dict[str, Any]], fetch: Fetch) -> Exchange:
    """The exchange of a conversation whose listed addresses were fetched. Raises `InputError`."""
    return Exchange.from_messages(await inlined(messages, fetch))


async def inlined(messages: Sequence[dict[str, Any]], fetch: Fetch) -> list[dict[str, Any]]:
    """The messages with bytes in place of addresses, so that what is judged is what a model will see."""
    made = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            message = {**message, "content": [await _inlined_part(part, fetch) for part in content]}
        made.append(message)
    return made


async def _inlined_part(part: Any, fetch: Fetch) -> Any:
    url = url_of(part) if isinstance(part, dict) else None
    if not isinstance(url, str) or url[:5].lower() == "data:":
        return part
    value, data = part["image_url"], data_url(await fetch(url))
    return {**part, "image_url": {**value, "url": data} if isinstance(value, dict) else data}


def url_of(part: Mapping[str, Any]) -> Any:
    """The address of a part that is an image, whatever stands there; None for another part."""
    value = part.get("image_url")
    return value.get("url") if isinstance(value, dict) else value


async def image(url: str, fetch: Fetch) -> str:
    """The image as a `data:` URL; raises `ImageError` for what is neither that nor an address that may be fetched."""
    return url if url[:5].lower() == "data:" else data_url(await fetch(url))


def data_url(data: bytes) -> str:
    """The format is found in the bytes, whatever the name says."""
    return "data:;base64," + base64.b64encode(data).decode("ascii")


async def no_fetch(url: str) -> bytes:  # noqa: ARG001
    """What fetches where the operator listed no hosts."""
    raise ImageError("remote images are not fetched here: send a data: URL, or list the host in images.hosts")


def shown(verdict: Verdict, include_reasoning: bool) -> Verdict:
    """The verdict as it leaves; the reasoning may restate what was judged, so it goes only where it was asked for."""
    return verdict if include_reasoning else verdict.model_copy(update={"reasoning": None})


def moderation(verdict: Verdict, messages: Sequence[dict[str, Any]], include_reasoning: bool) -> Moderation:
    """One result; `flagged` says what to do, so that a client which looks at nothing else fails closed."""
    sides = {"harmful/request": verdict.request, "harmful/response": verdict.response}
    applied = [one.label not in ("not_applicable", "error") for one in sides.values()]
    return Moderation(
        flagged=verdict.action == "block",
        categories={name: judged.label == "harmful" for name, judged in sides.items()},
        category_scores={name: judged.score for name, judged in sides.items()},
        category_applied_input_types={
            "harmful/request": _kinds(messages) if applied[0] else [],
            "harmful/response": ["text"] if applied[1] else [],
        },
        verdict=shown(verdict, include_reasoning),
    )


def _kinds(messages: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the user sent text, images, or both."""
    contents = [one.get("content") for one in messages if one.get("role") == "user"]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    images = [part for part in parts if isinstance(part, dict) and "image_url" in part]
    return [name for name, there in (("text", len(images) < len(parts)), ("image", images)) if there]


def blocked_reason(verdict: Verdict) -> str:
    """One line without content, for people who see a block."""
    if verdict.error:
        return f"the guard could not judge ({verdict.error.code})"
    sides: dict[str, Judgement] = {"request": verdict.request, "response": verdict.response}
    return "the guard finds harmful: " + ", ".join(name for name, one in sides.items() if one.label == "harmful")


def fault(code: str, message: str) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": "guard_error", "param": None, "code": code}}
