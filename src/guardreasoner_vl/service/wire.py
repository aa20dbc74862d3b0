"""The JSON bodies of requests and responses, and their conversion to exchanges.

Images are `data:` URLs. A remote URL is fetched only if the operator listed its host (`service.fetch`), and a string
that may be a file name is never opened: a client must not read the server's disk.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from guardreasoner_vl.errors import ImageError, InputError
from guardreasoner_vl.service.bodies import Body
from guardreasoner_vl.types import Exchange, Mode, Verdict
from guardreasoner_vl.types.media import is_data_url

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from guardreasoner_vl.types import Judgement

    Fetch = Callable[[str], Awaitable[bytes]]

Messages = Annotated[list[dict[str, Any]], Field(description="OpenAI-style chat messages; the last turn is judged.")]
MOST_INPUTS = 128
_STOCK_MODELS = ("omni-moderation", "text-moderation")
"""Prefixes of the model names that OpenAI's clients send by default; they mean the default guard."""


class GuardBody(Body):
    """The body of `/v1/guard`: prompt, images and response, or chat messages."""

    model_config = ConfigDict(
        title="GuardRequest",
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"prompt": "How do I bake bread?"},
                {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
            ]
        },
    )

    prompt: str | None = Field(default=None, description="What the user wrote.")
    images: list[str] = Field(default_factory=list, description="data: URLs")
    response: str | None = Field(default=None, description="What the model answered, to be judged too.")
    messages: Messages | None = None
    guard: str | None = Field(default=None, description="which of the service's guards; the default one if left out")
    mode: Mode | None = Field(default=None, description="How to judge; the guard's own mode if left out.")
    include_reasoning: bool = Field(
        default=False, description="Return the reasoning, which may restate what was judged."
    )

    async def exchange(self, fetch: Fetch) -> Exchange:
        """The exchange, its listed remote images fetched. Raises `InputError`."""
        if self.messages is not None:
            if self.prompt is not None or self.response is not None or self.images:
                raise InputError("give either messages or prompt, images and response, not both")
            return await build_exchange(self.messages, fetch)
        return Exchange(self.prompt, tuple([await image_as_url(url, fetch) for url in self.images]), self.response)


class ModerationRequest(Body):
    """OpenAI's moderation request; `messages` is added, since the original has no place for an answer."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": "How do I bake bread?"},
                {"input": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": ""}}]},
            ]
        }
    )

    input: str | list[str] | list[dict[str, Any]] | None = Field(
        default=None,
        description="A string, strings to be judged one by one, or text and image parts that are one exchange.",
    )
    messages: Messages | None = None
    model: str | None = Field(
        default=None, description="The guard's name; names of OpenAI's moderation models mean the default guard."
    )
    mode: Mode | None = Field(default=None, description="How to judge; the guard's own mode if left out.")
    include_reasoning: bool = Field(default=False, description="Return the reasoning in `verdict`.")

    @property
    def guard(self) -> str | None:
        """The guard that `model` names; None for the default one."""
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
        """The conversations to judge: one for each string, one for a list of parts, one for messages."""
        if self.messages is not None:
            return [self.messages]
        inputs = [self.input] if isinstance(self.input, str) else self.input or []
        texts: list[Any] = [text for text in inputs if isinstance(text, str)]
        return [[{"role": "user", "content": content}] for content in texts or [inputs]]

    def exchanges(self, fetch: Fetch) -> list[Awaitable[Exchange]]:
        """One awaitable for each conversation; awaiting it may raise `InputError`."""
        return [build_exchange(messages, fetch) for messages in self.conversations]


class Moderation(BaseModel):
    """One result in OpenAI's format, without its 13 categories, which the guard does not judge."""

    flagged: bool = Field(description="Whether to block, also where nothing could be judged.")
    categories: dict[str, bool] = Field(description="Whether `harmful/request` and `harmful/response` apply.")
    category_scores: dict[str, float | None] = Field(description="Probability of each; null if the engine gives none.")
    category_applied_input_types: dict[str, list[str]] = Field(description="What each was judged on: text, image.")
    verdict: Verdict = Field(description="The whole verdict.")


class ModerationResponse(BaseModel):
    """OpenAI's moderation response."""

    id: str = Field(description="The request's id.")
    model: str = Field(description="Name of the model that judged.")
    results: list[Moderation] = Field(description="One result for each input.")


async def build_exchange(messages: Sequence[dict[str, Any]], fetch: Fetch) -> Exchange:
    """The exchange of a conversation, its listed remote images fetched. Raises `InputError`."""
    return Exchange.from_messages(await inline_images(messages, fetch))


async def inline_images(messages: Sequence[dict[str, Any]], fetch: Fetch) -> list[dict[str, Any]]:
    """The messages with `data:` URLs in place of remote ones, so that the model sees what was judged."""
    inlined = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            message = {**message, "content": [await _inline_part(part, fetch) for part in content]}
        inlined.append(message)
    return inlined


async def _inline_part(part: Any, fetch: Fetch) -> Any:
    url = url_of(part) if isinstance(part, dict) else None
    if not isinstance(url, str) or is_data_url(url):
        return part
    return with_url(part, data_url(await fetch(url)))


def url_of(part: Mapping[str, Any]) -> Any:
    """The unchecked URL of an image part; None for another part."""
    value = part.get("image_url")
    return value.get("url") if isinstance(value, dict) else value


def with_url(part: Mapping[str, Any], url: str) -> dict[str, Any]:
    """The image part with another URL."""
    value = part["image_url"]
    return {**part, "image_url": {**value, "url": url} if isinstance(value, dict) else url}


async def image_as_url(url: str, fetch: Fetch) -> str:
    """The image as a `data:` URL. Raises `ImageError` unless it is one or may be fetched."""
    return url if is_data_url(url) else data_url(await fetch(url))


def data_url(data: bytes) -> str:
    """The bytes as a `data:` URL without a media type: decoding reads the format from the bytes."""
    return "data:;base64," + base64.b64encode(data).decode("ascii")


async def no_fetch(url: str) -> bytes:  # noqa: ARG001
    """The `Fetch` of a service without listed hosts: it refuses."""
    raise ImageError("remote images are not fetched here: send a data: URL, or list the host in images.hosts")


def public_verdict(verdict: Verdict, include_reasoning: bool) -> Verdict:
    """The verdict as it is sent. The reasoning may quote the input, so it is included only on request."""
    return verdict if include_reasoning else verdict.model_copy(update={"reasoning": None})


def moderation_result(verdict: Verdict, messages: Sequence[dict[str, Any]], include_reasoning: bool) -> Moderation:
    """One result. `flagged` is true for every block, so that a client that reads nothing else fails closed."""
    judgements = {"harmful/request": verdict.request, "harmful/response": verdict.response}
    applied = [judgement.label not in ("not_applicable", "error") for judgement in judgements.values()]
    return Moderation(
        flagged=verdict.action == "block",
        categories={name: judgement.label == "harmful" for name, judgement in judgements.items()},
        category_scores={name: judgement.score for name, judgement in judgements.items()},
        category_applied_input_types={
            "harmful/request": _kinds(messages) if applied[0] else [],
            "harmful/response": ["text"] if applied[1] else [],
        },
        verdict=public_verdict(verdict, include_reasoning),
    )


def _kinds(messages: Sequence[dict[str, Any]]) -> list[str]:
    """The kinds of input that the user sent: `text`, `image`, or both."""
    contents = [message.get("content") for message in messages if message.get("role") == "user"]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    images = [part for part in parts if isinstance(part, dict) and "image_url" in part]
    return [name for name, present in (("text", len(images) < len(parts)), ("image", images)) if present]


def blocked_reason(verdict: Verdict) -> str:
    """The reason of a block in one line, without content, for the user."""
    if verdict.error:
        return f"the guard could not judge ({verdict.error.code})"
    judgements: dict[str, Judgement] = {"request": verdict.request, "response": verdict.response}
    harmful = [name for name, judgement in judgements.items() if judgement.label == "harmful"]
    return "the guard finds harmful: " + ", ".join(harmful)


def error_body(code: str, message: str) -> dict[str, Any]:
    """The body of an error in OpenAI's format."""
    return {"error": {"message": message, "type": "guard_error", "param": None, "code": code}}
