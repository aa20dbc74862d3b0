"""Guards with a chat template of their own: Llama Guard 3, 3 Vision and 4, Qwen3Guard, LlavaGuard.

The server applies the template that comes with the weights; only the conversation is sent. Sources: the models'
cards and repositories (meta-llama/PurpleLlama, QwenLM/Qwen3Guard, ml-research/LlavaGuard).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from guardreasoner_vl.baselines.base import (
    Ask,
    UnreadableError,
    UnsupportedError,
    greedy,
    judged,
    one_image,
    score_of,
    text_only,
)
from guardreasoner_vl.engines.openai.chat import image_part, text_part
from guardreasoner_vl.types import CheckedImage

if TYPE_CHECKING:
    from guardreasoner_vl.baselines.base import Answer
    from guardreasoner_vl.types import Exchange, Judgement, Target

Message = dict[str, Any]


@dataclass(frozen=True)
class LlamaGuard:
    """Judges the last message: the request alone, then the request with the response.

    `parts`: contents as lists of parts (1B, Vision and 4), which drop a plain string without a word; the 8B's
    template wants the string. `most_images` is 0 for the text guards.
    """

    parts: bool = True
    most_images: int = 0
    reasons: bool = False

    def asks(self, exchange: Exchange) -> list[Ask]:
        images = [image for image in exchange.all_images if isinstance(image, CheckedImage)]
        if len(images) > self.most_images:
            raise UnsupportedError(f"this Llama Guard reads {self.most_images} images, here are {len(images)}")
        user: Message = {"role": "user", "content": self._content(exchange.prompt or "", images)}
        asks = []
        if exchange.has_prompt:
            asks.append(_chat([user], 20, "request"))
        if exchange.has_response:
            agent: Message = {"role": "assistant", "content": self._content(exchange.response or "", [])}
            asks.append(_chat([user, agent], 20, "response"))
        return asks

    def _content(self, text: str, images: list[CheckedImage]) -> str | list[dict[str, Any]]:
        return [*map(image_part, images), text_part(text)] if self.parts else text

    def read(self, ask: Ask, answer: Answer) -> dict[Target, Judgement]:
        first = answer.text.strip().partition("\n")[0].strip()
        if first not in ("safe", "unsafe"):
            raise UnreadableError("the first line is neither safe nor unsafe")
        score = score_of(answer.tokens, ["unsafe"], ["safe"])
        return {ask.about[0]: judged(first == "unsafe", score)}


@dataclass(frozen=True)
class Qwen3Guard:
    """Three grades; `controversial` says what the middle one counts as (its authors report both)."""

    controversial: Literal["harmful", "unharmful"] = "harmful"
    reasons: bool = False

    def asks(self, exchange: Exchange) -> list[Ask]:
        text_only(exchange, "Qwen3Guard")
        user: Message = {"role": "user", "content": exchange.prompt or ""}
        asks = []
        if exchange.has_prompt:
            asks.append(_chat([user], 128, "request"))
        if exchange.has_response:
            asks.append(_chat([user, {"role": "assistant", "content": exchange.response}], 128, "response"))
        return asks

    def read(self, ask: Ask, answer: Answer) -> dict[Target, Judgement]:
        found = re.match(r"\s*Safety: (Safe|Unsafe|Controversial)\s*(?:\n|$)", answer.text)
        if not found:
            raise UnreadableError("no line 'Safety:' with a known grade")
        harmful = found[1] == "Unsafe" or (found[1] == "Controversial" and self.controversial == "harmful")
        middle = ["Controversial", "Cont"]
        bad, good = (
            (["Unsafe", *middle], ["Safe"]) if self.controversial == "harmful" else (["Unsafe"], ["Safe", *middle])
        )
        return {ask.about[0]: judged(harmful, score_of(answer.tokens, bad, good))}


@dataclass(frozen=True)
class LlavaGuard:
    """Judges one image against the policy text of its authors; it reads neither prompt nor response."""

    reasons: bool = True

    def asks(self, exchange: Exchange) -> list[Ask]:
        image = one_image(exchange, "LlavaGuard")

        def payload() -> dict[str, Any]:
            content = [image_part(image), text_part(_policy())]
            return {"messages": [{"role": "user", "content": content}], **greedy(500)}

        return [Ask("chat/completions", payload, ("request",))]

    def read(self, ask: Ask, answer: Answer) -> dict[Target, Judgement]:
        found = re.match(r'\s*(?:```json\s*)?\{\s*"rating"\s*:\s*"(Safe|Unsafe)"', answer.text)
        if not found:
            raise UnreadableError("the answer does not begin with a rating")
        return {ask.about[0]: judged(found[1] == "Unsafe", score_of(answer.tokens, ["Unsafe"], ["Safe"]))}


@cache
def _policy() -> str:
    return files("guardreasoner_vl.baselines").joinpath("llavaguard_policy.txt").read_text("utf-8").strip()


def _chat(messages: list[Message], most: int, about: Target) -> Ask:
    return Ask("chat/completions", lambda: {"messages": messages, **greedy(most)}, (about,))
