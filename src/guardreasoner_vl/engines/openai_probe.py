"""What an OpenAI-compatible server can do: found out with tiny requests, so that nothing is guessed."""

from __future__ import annotations

import asyncio
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image

from guardreasoner_vl.engines.base import Capabilities, EngineRequest
from guardreasoner_vl.engines.openai_http import HttpError
from guardreasoner_vl.engines.openai_wire import (
    ONE_TOKEN,
    ServedModel,
    ServedModels,
    chat_payload,
    read,
    read_completion,
    with_logprobs,
)
from guardreasoner_vl.errors import EngineError, ModelError
from guardreasoner_vl.images import Picture
from guardreasoner_vl.protocol import IMAGE, Message

if TYPE_CHECKING:
    from guardreasoner_vl.engines.openai_http import HttpClient
    from guardreasoner_vl.engines.openai_wire import Completion

_REFUSED = frozenset({400, 422, 501})
_PREFIX = "A"
_SIDE = 56  # the smallest picture that Qwen2-VL's budget allows


async def choose_model(http: HttpClient, wanted: str | None) -> ServedModel:
    """The wanted model, or the first one served. Raises `ModelError` or `EngineError`."""
    try:
        models = read(ServedModels, await http.get("models")).data
    except HttpError as fault:
        if wanted is None or fault.status != 404:
            raise
        return ServedModel(id=wanted)  # a server without a list; the first request tells
    for model in models:
        if wanted in (None, model.id):
            return model
    names = ", ".join(model.id for model in models) or "none"
    raise ModelError(f"{http.server} does not serve {wanted or 'any model'}: choose one of those it serves ({names})")


async def probe_capabilities(http: HttpClient, model: ServedModel) -> Capabilities:
    """Ask for one token in three ways. Raises `EngineError` if the server fails for another reason than a refusal."""
    plain = EngineRequest((Message("user", "Hi"),))
    pictured = EngineRequest((Message("user", f"{IMAGE}\nHi"),), (_black_square(),))
    scored, seen, continued = await asyncio.gather(
        _try(http, model, chat_payload(plain, "") | with_logprobs()),
        _try(http, model, chat_payload(pictured, ""), _REFUSED | {500}),  # llama.cpp's answer to pictures
        _try(http, model, chat_payload(plain, _PREFIX)),
    )
    if not (scored or seen or continued):
        raise EngineError(f"{http.server} refuses every chat request: check that {model.id!r} is a chat model")
    return Capabilities(
        images=seen is not None,
        scores=scored is not None and any(token.top for token in scored.tokens()),
        forced_prefix=continued is not None and not _new_turn(scored, continued),
        prefix_cache=any(answer is not None and answer.reports_cached_tokens for answer in (scored, continued)),
        max_context=model.max_model_len,
    )


async def _try(
    http: HttpClient, model: ServedModel, payload: dict[str, Any], refused: frozenset[int] = _REFUSED
) -> Completion | None:
    """The answer, or None if the server refuses such a request."""
    try:
        body = await http.post("chat/completions", lambda: {"model": model.id} | ONE_TOKEN | payload)
    except HttpError as fault:
        if fault.status in refused:
            return None
        raise
    return read_completion(body)


def _black_square() -> Picture:
    encoded = BytesIO()
    Image.new("RGB", (_SIDE, _SIDE)).save(encoded, "PNG")
    return Picture(encoded.getvalue(), _SIDE, _SIDE)


def _new_turn(plain: Completion | None, continued: Completion) -> bool:
    """Whether the server ignored `continue_final_message`.

    It then closes the assistant's message and opens another turn, which takes more tokens than the one
    letter that the message holds.
    """
    if plain is None or not (plain.usage and continued.usage):
        return False
    return continued.usage.prompt_tokens > plain.usage.prompt_tokens + len(_PREFIX)
