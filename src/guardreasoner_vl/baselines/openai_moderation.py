"""OpenAI's Moderation API (`omni-moderation-latest`): texts and images, no reasoning.

It has no roles: the request is one input, the response another, and each of several images is a separate input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.baselines.base import WRONG_GUARD, AdapterRequest, UnreadableError, judgement_of
from guardreasoner_vl.engines.openai.chat import image_part, text_part
from guardreasoner_vl.types import CheckedImage

if TYPE_CHECKING:
    from guardreasoner_vl.baselines.base import AdapterAnswer
    from guardreasoner_vl.types import Exchange, Judgement, Target


@dataclass(frozen=True)
class OpenAIModeration:
    """Takes the worst of a request's inputs; the score is the highest one of all categories."""

    reasons: bool = False

    def build_requests(self, exchange: Exchange) -> list[AdapterRequest]:
        """One request for each image with the prompt, or for the prompt alone, and one for the response."""
        images = [image for image in exchange.images if isinstance(image, CheckedImage)]
        prompt = exchange.prompt or ""
        text = [text_part(prompt)] if prompt.strip() else []
        requests = [_moderation_request([*text, part], "request") for part in map(image_part, images)]
        if text and not images:
            requests.append(_moderation_request(text, "request"))
        if exchange.has_response:
            requests.append(_moderation_request([text_part(exchange.response or "")], "response"))
        return requests

    def read(self, request: AdapterRequest, answer: AdapterAnswer) -> dict[Target, Judgement]:
        """Read the flag and the highest score of the only result. Raises `UnreadableError` without one."""
        results = answer.content.get("results")
        result = results[0] if isinstance(results, list) and len(results) == 1 else None
        flagged = result.get("flagged") if isinstance(result, dict) else None
        if result is None or not isinstance(flagged, bool):
            raise UnreadableError(f"the answer has no single result with a flag: {WRONG_GUARD}")
        scores = result.get("category_scores")
        values = (
            [value for value in scores.values() if isinstance(value, (int, float))] if isinstance(scores, dict) else []
        )
        highest = max(values, default=None)
        return {
            request.targets[0]: judgement_of(flagged, highest if highest is not None and 0 <= highest <= 1 else None)
        }


def _moderation_request(parts: list[dict[str, Any]], target: Target) -> AdapterRequest:
    return AdapterRequest("moderations", lambda: {"input": parts}, (target,))
