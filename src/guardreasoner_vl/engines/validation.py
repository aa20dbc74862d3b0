"""What every engine refuses before it starts, and how a fault becomes one request's result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.engines.base import EngineResult, ScoreResult
from guardreasoner_vl.errors import EngineError, InputError
from guardreasoner_vl.protocol import IMAGE

if TYPE_CHECKING:
    from guardreasoner_vl.engines.base import Capabilities, EngineRequest
    from guardreasoner_vl.errors import GuardError


def check_request(request: EngineRequest, capabilities: Capabilities) -> None:
    """Raise `InputError` if images and placeholders differ in number, `EngineError` for what the engine cannot do."""
    places = sum(message.text.count(IMAGE) for message in request.messages)
    if places != len(request.images):
        raise InputError(f"{len(request.images)} images for {places} placeholders: give one for each")
    if request.images and not capabilities.images:
        raise EngineError("the model takes no images: use a vision-language model")
    if request.forced_prefix and not capabilities.forced_prefix:
        raise EngineError("the engine cannot begin the model's answer: use mode 'slow', or vLLM")


def check_scoring(request: EngineRequest, capabilities: Capabilities) -> None:
    """`check_request`, and raise `EngineError` if the engine cannot score."""
    if not capabilities.scores:
        raise EngineError("the server gives no log-probabilities: use mode 'slow' without scores, or vLLM")
    if not capabilities.forced_prefix:
        raise EngineError("the engine cannot begin the model's answer, so it cannot score: use mode 'slow', or vLLM")
    check_request(request, capabilities)


def failed(error: GuardError) -> EngineResult:
    """The result of a request that failed."""
    return EngineResult("", "error", error=str(error), error_code=error.code)


def unscored(error: GuardError) -> ScoreResult:
    """The score of a request that failed."""
    return ScoreResult((), (), error=str(error), error_code=error.code)
