# ruff: noqa: ARG002 (LiteLLM hands its arguments over by name)
"""A native LiteLLM guardrail: sees whole conversations, images and image-only messages included.

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

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

from litellm.exceptions import GuardrailRaisedException
from litellm.integrations.custom_guardrail import CustomGuardrail, log_guardrail_information
from litellm.types.guardrails import GuardrailEventHooks
from litellm.types.utils import EmbeddingResponse, ModelResponse, ModelResponseStream, TextCompletionResponse
from pydantic import BaseModel

from guardreasoner_vl.engines.openai.sse import TooLongError
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.integrations.growing import GrowingAnswers, completion_parts, message_parts, response_parts
from guardreasoner_vl.remote.client import DEFAULT_URL, GuardClient, blocked_reason, unjudged
from guardreasoner_vl.service.answers import HeldBack, all_of
from guardreasoner_vl.service.conversation import messages_of, said_beside
from guardreasoner_vl.service.litellm_wire import united
from guardreasoner_vl.service.parts import UnseenError, parts_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from guardreasoner_vl.service.parts import Part
    from guardreasoner_vl.types import Verdict

_UNKNOWN = unjudged("unknown_call", "this kind of call cannot be judged: use chat completions, messages or responses")
_CALLS = (
    *("completion", "acompletion", "text_completion", "atext_completion", "embedding", "embeddings", "aembedding"),
    *("anthropic_messages", "aanthropic_messages", "responses", "aresponses", "apply_guardrail"),
)
"""What LiteLLM names the kinds of calls whose requests are messages or texts; files and images come with others."""
_SAID = ("messages", "input", "prompt")
_SAID_BESIDE = ("suffix", "prediction", "documents", "query", "extra_body")
"""Where else a request may hold what a model reads."""


class GuardReasonerGuardrail(CustomGuardrail):
    """Judges chat and text completions, messages, responses and what is embedded; other calls are blocked, unjudged.

    `api_base` and `api_key` are the guard service's; `timeout`, `on_error` and `guard` are `GuardClient`'s, `window` is
    in characters of a streamed answer.
    """

    use_native_lifecycle_hooks: ClassVar[bool] = True
    """Else LiteLLM's proxy would run hooks of its own for `apply_guardrail`, which let pass what they do not read."""

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
        if not hasattr(CustomGuardrail, "use_native_lifecycle_hooks"):
            raise TypeError("this version of LiteLLM would run hooks of its own: install a newer one")
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
        await self._check_request(data, call_type)

    @log_guardrail_information
    async def async_moderation_hook(self, data: dict[str, Any], user_api_key_dict: Any, call_type: Any) -> None:
        """The request is judged while the model answers already."""
        await self._check_request(data, call_type)

    @log_guardrail_information
    async def async_post_call_success_hook(self, data: dict[str, Any], user_api_key_dict: Any, response: Any) -> None:
        """Each answer is judged, in its conversation."""
        if not isinstance(response, EmbeddingResponse):  # which says nothing
            self._obey(await self._judged(lambda: (_conversation(data), _answers(response))))

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """Holds a streamed answer back until it was judged, window by window."""
        growing = GrowingAnswers()

        async def judge() -> Verdict:
            return await self._judged(lambda: (_conversation(request_data), growing.parts))

        held: HeldBack[Any] = HeldBack(judge, self._window)
        async for chunk in response:
            before = growing.came
            self._read(growing, chunk)
            for released in await held.add(chunk, growing.came - before, whole=growing.whole):
                yield released
            self._obey(held.verdict)
        before = growing.came
        self._read(growing, None)
        for released in [*await held.add(None, growing.came - before, whole=True), *await held.finish()]:
            if released is not None:
                yield released
        self._obey(held.verdict)

    async def apply_guardrail(
        self,
        inputs: Any,
        request_data: dict[str, Any],
        input_type: Literal["request", "response"],
        logging_obj: Any = None,
    ) -> Any:
        """LiteLLM's own way to have texts, images and calls judged: the inputs as they came, or a raised refusal.

        The proxy's routes run the hooks above; what calls this are `/guardrails/apply_guardrail` and LiteLLM's
        translations of routes.
        """

        def said() -> tuple[list[dict[str, Any]], list[list[Part]]]:
            given = {name: _plain(inputs.get(name)) for name in ("texts", "images", "tool_calls")}
            asked = _plain(inputs.get("structured_messages"))
            if input_type == "response" and not asked and any(request_data.get(name) for name in _SAID):
                return [*_conversation(request_data), *united(input_type, None, **given)], []
            return united(input_type, asked, **given), []

        self._obey(await self._judged(said))
        return inputs

    async def async_logging_hook(self, kwargs: Any, result: Any, call_type: Any) -> tuple[Any, Any]:
        """Nothing: what is logged was judged before."""
        return kwargs, result

    async def _check_request(self, data: dict[str, Any], call_type: Any) -> None:
        kind = getattr(call_type, "value", call_type)
        if kind is not None and kind not in _CALLS:
            self._refuse(_UNKNOWN)
        self._obey(await self._judged(lambda: (_conversation(data), [])))

    async def _judged(self, said: Callable[[], tuple[list[dict[str, Any]], list[list[Part]]]]) -> Verdict:
        """The verdict on a conversation with each of the answers; on the conversation alone where there is none."""
        try:
            messages, answers = said()
        except InputError as error:
            return unjudged(error.code, str(error))
        conversations = [[*messages, {"role": "assistant", "content": parts}] for parts in answers] or [messages]
        verdicts = await all_of(self.client.ajudge(messages=conversation) for conversation in conversations)
        return next((verdict for verdict in verdicts if verdict.action == "block"), verdicts[0])

    def _read(self, growing: GrowingAnswers, chunk: Any) -> None:
        try:
            if chunk is None:
                growing.finish()
            elif isinstance(chunk, (bytes, str)):
                growing.feed(chunk if isinstance(chunk, bytes) else chunk.encode())
            elif isinstance(chunk, (ModelResponseStream, TextCompletionResponse)):
                growing.chunk(_plain(chunk))
            elif isinstance(chunk, (BaseModel, dict)):
                growing.event(_plain(chunk))
            else:
                self._refuse(_UNKNOWN)
        except (UnseenError, TooLongError) as error:
            self._refuse(unjudged(error.code, str(error)))

    def _obey(self, verdict: Verdict | None) -> None:
        if verdict and verdict.action == "block":
            self._refuse(verdict)

    def _refuse(self, verdict: Verdict) -> NoReturn:
        raise GuardrailRaisedException(
            guardrail_name=self.guardrail_name,
            message=blocked_reason(verdict),
            should_wrap_with_default_message=False,
            blocked_content=verdict.flagged is True,
        )


class _UnknownCallError(InputError):
    code = "unknown_call"


def _conversation(data: dict[str, Any]) -> list[dict[str, Any]]:
    """What a request says, as chat messages. Raises `InputError` for what is neither messages nor texts."""
    first, *others = [data[name] for name in _SAID if data.get(name)] or [None]
    if isinstance(first, dict):  # a prompt that the provider keeps, with its variables
        first, others = [], [first, *others]
    elif not isinstance(first, (str, list)):
        raise _UnknownCallError("the request holds no messages")
    beside = [part for said in others for message in _messages(said) for part in message["content"]]
    return said_beside(messages_of(first), [*beside, *parts_of([data.get(name) for name in _SAID_BESIDE])])


def _messages(said: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": parts_of(said)}] if isinstance(said, dict) else messages_of(said)


def _answers(response: Any) -> list[list[Part]]:
    """What of each answer is to be judged. Raises `InputError` for an unknown kind."""
    said = _plain(response)
    if isinstance(response, (ModelResponse, TextCompletionResponse)):
        if isinstance(response, TextCompletionResponse) and any(
            not isinstance(choice.get("text"), str) for choice in said["choices"]
        ):
            raise _UnknownCallError("a choice holds no text")
        return completion_parts(said)
    if (
        isinstance(said, dict)
        and isinstance(said.get("content"), list)
        and said.get("role", "assistant") == "assistant"
    ):
        return [message_parts(said)]
    if isinstance(said, dict) and said.get("object") == "response" and isinstance(said.get("output"), list):
        return [response_parts(said)]
    raise _UnknownCallError("this kind of answer cannot be judged")


def _plain(value: Any) -> Any:
    """Objects of LiteLLM's as JSON has them."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", warnings=False)  # LiteLLM fills its types with what they do not declare
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
