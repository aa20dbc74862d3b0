"""Builds requests for OpenAI's chat completions, with vLLM's extensions."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.protocol import IMAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guardreasoner_vl.engines.base import EngineRequest
    from guardreasoner_vl.types import CheckedImage

TOP_LOGPROBS = 20
"""The most that OpenAI's API and vLLM's default allow."""

STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
ONE_TOKEN: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "top_p": 1.0}

NEUTRAL: dict[str, float] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""Sampling parameters with values that have no effect. They are sent because a server's defaults may differ: vLLM reads
its defaults from the model's `generation_config.json`. The last three are vLLM's, and some servers refuse them."""

GREEDY: dict[str, float] = {"temperature": 0.0, "top_p": 1.0, **NEUTRAL}


def chat_payload(request: EngineRequest, prefix: str) -> dict[str, Any]:
    """The request's messages, with images inlined and `prefix` as the start of the assistant's turn."""
    images = iter(request.images)
    messages: list[dict[str, Any]] = [
        {"role": message.role, "content": _message_content(message.text, images)} for message in request.messages
    ]
    payload: dict[str, Any] = {"messages": messages}
    if prefix:
        messages.append({"role": "assistant", "content": prefix})
        payload |= {"continue_final_message": True, "add_generation_prompt": False}
    if request.pixels is not None:
        budget = request.pixels
        payload["mm_processor_kwargs"] = {"min_pixels": budget.min_pixels, "max_pixels": budget.max_pixels}
    return payload


def sampling(request: EngineRequest) -> dict[str, Any]:
    """The request's sampling parameters, besides `NEUTRAL`; the seed only if the request has one."""
    parameters: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_new_tokens,
    }
    return parameters if request.seed is None else parameters | {"seed": request.seed}


def logprob_parameters() -> dict[str, Any]:
    """The parameters that request the likeliest tokens at each position."""
    return {"logprobs": True, "top_logprobs": TOP_LOGPROBS}


def _message_content(text: str, images: Iterator[CheckedImage]) -> str | list[dict[str, Any]]:
    """Plain text, or a list of parts in which each placeholder is replaced by its image."""
    first, *others = text.split(IMAGE)
    if not others:
        return first
    parts = [text_part(first)]
    for following in others:
        parts += [image_part(next(images)), text_part(following)]
    return [part for part in parts if part.get("text") != ""]


def text_part(text: str) -> dict[str, Any]:
    """A text part of a message."""
    return {"type": "text", "text": text}


def image_part(image: CheckedImage) -> dict[str, Any]:
    """An image part of a message."""
    return {"type": "image_url", "image_url": {"url": image_data_url(image)}}


def image_data_url(image: CheckedImage) -> str:
    """The image's bytes as a `data:` URL, so that the server does not fetch anything."""
    return f"data:image/png;base64,{base64.b64encode(image.png).decode('ascii')}"
