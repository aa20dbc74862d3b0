"""Checks that every engine makes before it runs a request, and the results of requests that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.engines.base import EngineResult, ScoreResult
from guardreasoner_vl.errors import EngineError, InputError, InputTooLongError
from guardreasoner_vl.protocol import IMAGE

if TYPE_CHECKING:
    from guardreasoner_vl.engines.base import Capabilities, EngineRequest
    from guardreasoner_vl.errors import GuardError


def check_request(request: EngineRequest, capabilities: Capabilities) -> None:
    """Raise `InputError` unless each placeholder has an image that the model can see, `EngineError` if the engine
    lacks another capability."""
    placeholders = sum(message.text.count(IMAGE) for message in request.messages)
    if placeholders != len(request.images):
        raise InputError(f"{len(request.images)} images for {placeholders} placeholders: pass one image for each")
    if request.images and not capabilities.images:
        raise InputError("the model accepts no images: leave them out, or use a vision-language model")
    if request.forced_prefix and not capabilities.forced_prefix:
        raise EngineError("the engine cannot prefill the model's answer: use mode 'slow', or vLLM")


def check_scoring(request: EngineRequest, capabilities: Capabilities) -> None:
    """Like `check_request`; also raise `EngineError` if the engine cannot score."""
    if not capabilities.scores:
        raise EngineError("the server returns no log-probabilities: use mode 'slow' without scores, or vLLM")
    if not capabilities.forced_prefix:
        raise EngineError("the engine cannot prefill the model's answer, so it cannot score: use mode 'slow', or vLLM")
    check_request(request, capabilities)


def check_length(tokens: int, max_context: int) -> None:
    """Raise `InputTooLongError` if a prompt of this many tokens leaves no room for an answer."""
    if tokens >= max_context:
        raise InputTooLongError(
            f"the exchange takes {tokens} tokens, the model reads {max_context}: shorten it or judge it in windows "
            "(long_input)"
        )


def error_result(error: GuardError) -> EngineResult:
    """The result of a request that failed."""
    return EngineResult("", "error", error=str(error), error_code=error.code)


def error_score(error: GuardError) -> ScoreResult:
    """The score of a request that failed."""
    return ScoreResult((), (), error=str(error), error_code=error.code)
