"""OpenAI's Moderation API (`omni-moderation-latest`): texts and images, no reasoning.

It knows no roles: the request is one input, the response another, and of several images each is one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.baselines.base import Ask, UnreadableError, judged
from guardreasoner_vl.engines.openai.chat import image_part, text_part
from guardreasoner_vl.types import CheckedImage

if TYPE_CHECKING:
    from guardreasoner_vl.baselines.base import Answer
    from guardreasoner_vl.types import Exchange, Judgement, Target


@dataclass(frozen=True)
class OpenAIModeration:
    """The worst of a request's inputs counts; the score is the highest of all categories."""

    reasons: bool = False

    def asks(self, exchange: Exchange) -> list[Ask]:
        images = [image for image in exchange.images if isinstance(image, CheckedImage)]
        prompt = exchange.prompt or ""
        text = [text_part(prompt)] if prompt.strip() else []
        asks = [_ask([*text, part], "request") for part in map(image_part, images)]
        if text and not images:
            asks.append(_ask(text, "request"))
        if exchange.has_response:
            asks.append(_ask([text_part(exchange.response or "")], "response"))
        return asks

    def read(self, ask: Ask, answer: Answer) -> dict[Target, Judgement]:
        results = answer.content.get("results")
        result = results[0] if isinstance(results, list) and len(results) == 1 else None
        flagged = result.get("flagged") if isinstance(result, dict) else None
        if result is None or not isinstance(flagged, bool):
            raise UnreadableError("no single result with a flag")
        scores = result.get("category_scores")
        values = (
            [value for value in scores.values() if isinstance(value, (int, float))] if isinstance(scores, dict) else []
        )
        highest = max(values, default=None)
        return {ask.about[0]: judged(flagged, highest if highest is not None and 0 <= highest <= 1 else None)}


def _ask(parts: list[dict[str, Any]], about: Target) -> Ask:
    return Ask("moderations", lambda: {"input": parts}, (about,))
