"""Finds out the capabilities of an OpenAI-compatible server by sending short requests."""

from __future__ import annotations

import asyncio
import logging
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from guardreasoner_vl.engines.base import Capabilities, EngineRequest
from guardreasoner_vl.engines.openai.chat import NEUTRAL, ONE_TOKEN, chat_payload, logprob_parameters
from guardreasoner_vl.engines.openai.completion import ServedModel, ServedModels, read_completion, read_model
from guardreasoner_vl.engines.openai.http import HttpError
from guardreasoner_vl.errors import EngineError, ModelError
from guardreasoner_vl.protocol import IMAGE, Message
from guardreasoner_vl.types import CheckedImage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guardreasoner_vl.engines.openai.completion import Completion
    from guardreasoner_vl.engines.openai.http import HttpClient

_log = logging.getLogger(__name__)
_REFUSED = frozenset({400, 422, 501})
_PREFIX = "A"
_SOME_TOKENS = 16
_PENALTY = 2.0
_REMEDY = "if it is vLLM, start it with --generation-config vllm, or a generation_config.json may change labels"
_SIDE = 56  # the smallest image that Qwen2-VL's budget allows


async def choose_model(http: HttpClient, name: str | None) -> ServedModel:
    """The served model called `name`, or the first one if None. Raises `ModelError` or `EngineError`."""
    try:
        models = read_model(ServedModels, await http.get("models")).data
    except HttpError as fault:
        if name is None or fault.status != 404:
            raise
        return ServedModel(id=name)  # the server has no list of models; the first request checks the name
    for model in models:
        if name in (None, model.id):
            return model
    names = ", ".join(model.id for model in models) or "none"
    raise ModelError(f"{http.server} does not serve {name or 'any model'}: choose one of its models ({names})")


class ProbeResult(NamedTuple):
    """A server's capabilities, and the part of `NEUTRAL` that it accepts."""

    capabilities: Capabilities
    neutral: dict[str, float]


async def probe_server(http: HttpClient, model: ServedModel) -> ProbeResult:
    """Test each capability with a short request. Raises `EngineError` if a request fails without being refused.

    Logs a warning if the server's own sampling defaults may change labels.
    """
    plain = EngineRequest((Message("user", "Hi"),))
    image_request = EngineRequest((Message("user", f"{IMAGE}\nHi"),), (_black_square(),))
    neutral = await _accepted_neutral(http, model, chat_payload(plain, ""))
    scored, with_image, continued, penalised = await asyncio.gather(
        _try(http, model, chat_payload(plain, "") | neutral | logprob_parameters()),
        _try(http, model, chat_payload(image_request, "") | neutral, _REFUSED | {500}),  # llama.cpp's answer to images
        _try(http, model, chat_payload(plain, _PREFIX) | neutral),
        _honours_penalty(http, model, neutral),
    )
    if not (scored or with_image or continued):
        raise EngineError(f"{http.server} refuses every chat request: check that {model.id!r} is a chat model")
    if not penalised:
        _log.warning("%s does not apply the repetition_penalty of a request: %s", http.server, _REMEDY)
    capabilities = Capabilities(
        images=with_image is not None,
        scores=scored is not None and any(token.top for token in scored.tokens()),
        forced_prefix=continued is not None and not _new_turn(scored, continued),
        prefix_cache=any(answer is not None and answer.reports_cached_tokens for answer in (scored, continued)),
        max_context=model.max_model_len,
    )
    return ProbeResult(capabilities, neutral)


async def _accepted_neutral(http: HttpClient, model: ServedModel, payload: dict[str, Any]) -> dict[str, float]:
    """The part of `NEUTRAL` that the server accepts: all, or each parameter that it accepts when sent alone."""
    if await _try(http, model, payload | NEUTRAL):
        return dict(NEUTRAL)
    answers = await asyncio.gather(*(_try(http, model, payload | {name: NEUTRAL[name]}) for name in NEUTRAL))
    return {name: value for (name, value), answer in zip(NEUTRAL.items(), answers, strict=True) if answer}


async def _honours_penalty(http: HttpClient, model: ServedModel, neutral: Mapping[str, float]) -> bool:
    """Whether the server applies `repetition_penalty`: a high value must change the answer to a request to repeat."""
    if "repetition_penalty" not in neutral:
        return False
    repeat = chat_payload(EngineRequest((Message("user", "Repeat: tea tea tea tea tea tea tea tea"),)), "")
    answers = await asyncio.gather(
        *(
            _try(http, model, {**repeat, **neutral, "max_tokens": _SOME_TOKENS, "repetition_penalty": penalty})
            for penalty in (1.0, _PENALTY)
        )
    )
    first, second = (answer and answer.text for answer in answers)
    return first != second


async def _try(
    http: HttpClient, model: ServedModel, payload: dict[str, Any], refused: frozenset[int] = _REFUSED
) -> Completion | None:
    """The answer, or None if the server refuses the request."""
    try:
        body = await http.post("chat/completions", lambda: {"model": model.id} | ONE_TOKEN | payload)
    except HttpError as fault:
        if fault.status in refused:
            return None
        raise
    return read_completion(body)


def _black_square() -> CheckedImage:
    encoded = BytesIO()
    Image.new("RGB", (_SIDE, _SIDE)).save(encoded, "PNG")
    return CheckedImage(encoded.getvalue(), _SIDE, _SIDE)


def _new_turn(plain: Completion | None, continued: Completion) -> bool:
    """Whether the server ignored `continue_final_message`.

    Such a server closes the assistant's message and starts another turn, which adds more prompt tokens than the
    message's one letter.
    """
    if plain is None or not (plain.usage and continued.usage):
        return False
    before, after = plain.usage.prompt_tokens, continued.usage.prompt_tokens
    return before is not None and after is not None and after > before + len(_PREFIX)
