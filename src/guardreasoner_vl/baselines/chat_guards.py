"""Guards with their own chat template: Llama Guard 3, 3 Vision and 4, Qwen3Guard, LlavaGuard.

Only the conversation is sent; the server applies the template that comes with the weights. Sources: the models' cards
and repositories (meta-llama/PurpleLlama, QwenLM/Qwen3Guard, ml-research/LlavaGuard).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from guardreasoner_vl.baselines.base import (
    WRONG_GUARD,
    AdapterRequest,
    UnreadableError,
    UnsupportedError,
    greedy,
    judgement_of,
    one_image,
    score_of,
    text_only,
)
from guardreasoner_vl.engines.openai.chat import image_part, text_part
from guardreasoner_vl.types import CheckedImage

if TYPE_CHECKING:
    from guardreasoner_vl.baselines.base import AdapterAnswer
    from guardreasoner_vl.types import Exchange, Judgement, Target

ChatMessage = dict[str, Any]


@dataclass(frozen=True)
class LlamaGuard:
    """Judges the last message: the request alone, then the request with the response.

    `parts`: send contents as lists of parts, as the templates of 1B, Vision and 4 require (they silently drop a plain
    string); the 8B's template requires a string. `most_images` is 0 for text guards.
    """

    parts: bool = True
    most_images: int = 0
    reasons: bool = False

    def build_requests(self, exchange: Exchange) -> list[AdapterRequest]:
        """One request for the prompt and one for the response. Raises `UnsupportedError` for too many images."""
        images = [image for image in exchange.all_images if isinstance(image, CheckedImage)]
        if len(images) > self.most_images:
            raise UnsupportedError(
                f"this Llama Guard accepts at most {self.most_images} images; the exchange has {len(images)}"
            )
        user: ChatMessage = {"role": "user", "content": self._content(exchange.prompt or "", images)}
        requests = []
        if exchange.has_prompt:
            requests.append(_chat_request([user], 20, "request"))
        if exchange.has_response:
            agent: ChatMessage = {"role": "assistant", "content": self._content(exchange.response or "", [])}
            requests.append(_chat_request([user, agent], 20, "response"))
        return requests

    def _content(self, text: str, images: list[CheckedImage]) -> str | list[dict[str, Any]]:
        return [*map(image_part, images), text_part(text)] if self.parts else text

    def read(self, request: AdapterRequest, answer: AdapterAnswer) -> dict[Target, Judgement]:
        """Read the first line, `safe` or `unsafe`. Raises `UnreadableError` for any other."""
        first = answer.text.strip().partition("\n")[0].strip()
        if first not in ("safe", "unsafe"):
            raise UnreadableError(f"the answer's first line is neither safe nor unsafe: {WRONG_GUARD}")
        score = score_of(answer.tokens, ["unsafe"], ["safe"])
        return {request.targets[0]: judgement_of(first == "unsafe", score)}


@dataclass(frozen=True)
class Qwen3Guard:
    """Reads three grades; `controversial` is the label of the middle one (its authors report both)."""

    controversial: Literal["harmful", "unharmful"] = "harmful"
    reasons: bool = False

    def build_requests(self, exchange: Exchange) -> list[AdapterRequest]:
        """One request for the prompt and one for the response. Raises `UnsupportedError` for images."""
        text_only(exchange, "Qwen3Guard")
        user: ChatMessage = {"role": "user", "content": exchange.prompt or ""}
        requests = []
        if exchange.has_prompt:
            requests.append(_chat_request([user], 128, "request"))
        if exchange.has_response:
            requests.append(_chat_request([user, {"role": "assistant", "content": exchange.response}], 128, "response"))
        return requests

    def read(self, request: AdapterRequest, answer: AdapterAnswer) -> dict[Target, Judgement]:
        """Read the grade in the first line. Raises `UnreadableError` if there is none."""
        grade = re.match(r"\s*Safety: (Safe|Unsafe|Controversial)\s*(?:\n|$)", answer.text)
        if not grade:
            raise UnreadableError(f"the answer has no line 'Safety:' with a known grade: {WRONG_GUARD}")
        harmful = grade[1] == "Unsafe" or (grade[1] == "Controversial" and self.controversial == "harmful")
        middle = ["Controversial", "Cont"]
        bad, good = (
            (["Unsafe", *middle], ["Safe"]) if self.controversial == "harmful" else (["Unsafe"], ["Safe", *middle])
        )
        return {request.targets[0]: judgement_of(harmful, score_of(answer.tokens, bad, good))}


@dataclass(frozen=True)
class LlavaGuard:
    """Judges one image against its authors' policy text; ignores prompt and response."""

    reasons: bool = True

    def build_requests(self, exchange: Exchange) -> list[AdapterRequest]:
        """One request with the image and the policy. Raises `UnsupportedError` unless there is exactly one image."""
        image = one_image(exchange, "LlavaGuard")

        def payload() -> dict[str, Any]:
            content = [image_part(image), text_part(_policy_text())]
            return {"messages": [{"role": "user", "content": content}], **greedy(500)}

        return [AdapterRequest("chat/completions", payload, ("request",))]

    def read(self, request: AdapterRequest, answer: AdapterAnswer) -> dict[Target, Judgement]:
        """Read the rating at the start of the JSON. Raises `UnreadableError` if there is none."""
        rating = re.match(r'\s*(?:```json\s*)?\{\s*"rating"\s*:\s*"(Safe|Unsafe)"', answer.text)
        if not rating:
            raise UnreadableError(f"the answer does not start with a rating: {WRONG_GUARD}")
        return {request.targets[0]: judgement_of(rating[1] == "Unsafe", score_of(answer.tokens, ["Unsafe"], ["Safe"]))}


@cache
def _policy_text() -> str:
    return files("guardreasoner_vl.baselines").joinpath("llavaguard_policy.txt").read_text("utf-8").strip()


def _chat_request(messages: list[ChatMessage], max_tokens: int, target: Target) -> AdapterRequest:
    return AdapterRequest("chat/completions", lambda: {"messages": messages, **greedy(max_tokens)}, (target,))
