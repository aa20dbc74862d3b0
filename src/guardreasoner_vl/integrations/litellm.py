# ruff: noqa: ARG002 (LiteLLM hands its arguments over by name)
"""A native LiteLLM guardrail: sees whole conversations, pictures and image-only messages included.

    guardrails:
      - guardrail_name: guardreasoner
        litellm_params:
          guardrail: guardreasoner_vl.integrations.litellm.GuardReasonerGuardrail
          mode: [pre_call, post_call]
          default_on: true
          api_base: http://127.0.0.1:8800

Name this very class there: LiteLLM calls the streaming hook only of the class that defines it, not of a subclass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn

from litellm.exceptions import GuardrailRaisedException
from litellm.integrations.custom_guardrail import CustomGuardrail, log_guardrail_information
from litellm.types.guardrails import GuardrailEventHooks
from litellm.types.utils import EmbeddingResponse, ModelResponse, ModelResponseStream, TextCompletionResponse

from guardreasoner_vl.integrations.client import DEFAULT_URL, GuardClient, blocked_reason, unjudged
from guardreasoner_vl.service.answers import HeldAnswers, answer_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from guardreasoner_vl.types import Verdict

_UNKNOWN = unjudged("unknown_call", "this kind of call cannot be judged: use chat completions")


class GuardReasonerGuardrail(CustomGuardrail):
    """Judges chat and text completions and what is embedded; other kinds of calls are blocked, unjudged.

    `api_base` and `api_key` are the guard service's; `timeout`, `on_error` and `guard` are `GuardClient`'s, `window` is
    in characters of a streamed answer.
    """

    def __init__(
        self,
        api_base: str = DEFAULT_URL,
        api_key: str | None = None,
        timeout: float = 120.0,
        on_error: Literal["block", "allow"] = "block",
        guard: str | None = None,
        window: int = 400,
        **kwargs: Any,
    ) -> None:
        hooks = [GuardrailEventHooks.pre_call, GuardrailEventHooks.during_call, GuardrailEventHooks.post_call]
        super().__init__(timeout=timeout, supported_event_hooks=hooks, **kwargs)
        self.client = GuardClient(api_base, api_key, timeout, on_error=on_error, guard=guard)
        self._window = window

    @log_guardrail_information
    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: Any
    ) -> None:
        """The model is asked only after the request was judged."""
        post_call = GuardrailEventHooks.post_call
        if data.get("stream") and "proxy_server_request" not in data and self.should_run_guardrail(data, post_call):
            self._refuse(unjudged("unheld_stream", "outside its proxy LiteLLM holds no streamed answer back"))
        await self._check(data, None)

    @log_guardrail_information
    async def async_moderation_hook(self, data: dict[str, Any], user_api_key_dict: Any, call_type: Any) -> None:
        """The request is judged while the model answers already."""
        await self._check(data, None)

    @log_guardrail_information
    async def async_post_call_success_hook(self, data: dict[str, Any], user_api_key_dict: Any, response: Any) -> None:
        """Each answer is judged, in its conversation."""
        for answer in _answers(response):
            await self._check(data, answer)

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """Holds a streamed answer back until it was judged, window by window."""

        async def judge(answer: dict[str, Any]) -> Verdict:
            return await self._verdict(request_data, answer)

        held: HeldAnswers[Any] = HeldAnswers(judge, self._window)
        async for chunk in response:
            deltas = _deltas(chunk)
            if deltas is None:
                self._refuse(_UNKNOWN)
            for released in await held.add_chunk(chunk, deltas):
                yield released
            if held.verdict and held.is_blocked:
                self._refuse(held.verdict)
        for released in await held.finish():
            yield released
        if held.verdict and held.is_blocked:
            self._refuse(held.verdict)

    async def _check(self, data: dict[str, Any], answer: dict[str, Any] | None) -> None:
        verdict = await self._verdict(data, answer)
        if verdict.action == "block":
            self._refuse(verdict)

    async def _verdict(self, data: dict[str, Any], answer: dict[str, Any] | None) -> Verdict:
        messages = _messages(data)
        if messages is None or (answer is not None and not answer):
            return _UNKNOWN
        return await self.client.ajudge(messages=[*messages, answer] if answer else messages)

    def _refuse(self, verdict: Verdict) -> NoReturn:
        raise GuardrailRaisedException(
            guardrail_name=self.guardrail_name,
            message=blocked_reason(verdict),
            should_wrap_with_default_message=False,
            blocked_content=verdict.flagged is True,
        )


def _messages(data: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The request as chat messages; None for what is neither messages nor text."""
    if isinstance(data.get("messages"), list):
        return list(data["messages"])
    texts = data.get("prompt") or data.get("input")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return None
    return [{"role": "user", "content": "\n\n".join(texts)}]


def _answers(response: Any) -> list[dict[str, Any]]:
    """The answers as messages; an empty one stands for what cannot be judged. Embeddings say nothing."""
    if isinstance(response, ModelResponse):
        return [answer_of(choice.message.model_dump()) for choice in response.choices]
    if isinstance(response, TextCompletionResponse):
        texts = [choice.text for choice in response.choices]
        return [answer_of({"content": text}) if isinstance(text, str) else {} for text in texts]
    return [] if isinstance(response, EmbeddingResponse) else [{}]


def _deltas(chunk: Any) -> list[dict[str, Any]] | None:
    """A chunk's choices; None for what cannot be judged."""
    if isinstance(chunk, ModelResponseStream):
        return [choice.model_dump() for choice in chunk.choices]
    if isinstance(chunk, TextCompletionResponse):
        return [{"index": choice.index, "delta": {"content": choice.text}} for choice in chunk.choices]
    return None
