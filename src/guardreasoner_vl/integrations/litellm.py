# ruff: noqa: ARG002 (LiteLLM passes its arguments by name)
"""A native LiteLLM guardrail, which judges whole conversations, images included.

    guardrails:
      - guardrail_name: guardreasoner
        litellm_params:
          guardrail: guardreasoner_vl.integrations.litellm.GuardReasonerGuardrail
          mode: [pre_call, post_call]
          default_on: true
          api_base: http://127.0.0.1:8800

Name exactly this class: LiteLLM calls the streaming hook only on the class that defines it, not on a subclass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from litellm.exceptions import GuardrailRaisedException
from litellm.integrations.custom_guardrail import CustomGuardrail, log_guardrail_information
from litellm.types.guardrails import GuardrailEventHooks
from litellm.types.utils import EmbeddingResponse, ModelResponse, ModelResponseStream, TextCompletionResponse
from pydantic import BaseModel

from guardreasoner_vl.engines.openai.sse import TooLongError
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.integrations.stream_events import StreamedAnswers, completion_parts, message_parts, response_parts
from guardreasoner_vl.remote.client import DEFAULT_URL, GuardClient, blocked_reason, unjudged
from guardreasoner_vl.service.answers import StreamBuffer, gather_or_cancel
from guardreasoner_vl.service.conversation import messages_of, with_user_parts
from guardreasoner_vl.service.litellm_wire import merge_inputs
from guardreasoner_vl.service.parts import UnsupportedContentError, parts_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from guardreasoner_vl.choices import Action, Target
    from guardreasoner_vl.service.parts import Part
    from guardreasoner_vl.types import Verdict

_UNKNOWN = unjudged("unknown_call", "this kind of call cannot be judged: use chat completions, messages or responses")
_CALLS = (
    *("completion", "acompletion", "text_completion", "atext_completion", "embedding", "embeddings", "aembedding"),
    *("anthropic_messages", "aanthropic_messages", "responses", "aresponses", "apply_guardrail"),
)
"""LiteLLM's names of the call types whose requests are messages or texts."""
_INPUT_FIELDS = ("messages", "input", "prompt")
_OTHER_INPUT_FIELDS = ("suffix", "prediction", "documents", "query", "extra_body")
"""Other fields of a request that a model may read."""


class GuardReasonerGuardrail(CustomGuardrail):
    """Judges chat and text completions, messages, responses and embeddings; other calls are blocked without a verdict.

    `api_base` and `api_key` are the guard service's; `timeout`, `on_error` and `guard` are those of `GuardClient`;
    `window` is the number of new characters of a streamed answer after which it is judged again.
    """

    use_native_lifecycle_hooks: ClassVar[bool] = True
    """Without this, LiteLLM's proxy runs its own hooks around `apply_guardrail`, which let unread content pass."""

    def __init__(
        self,
        api_base: str = DEFAULT_URL,
        api_key: str | None = None,
        timeout: float = 150.0,
        on_error: Action = "block",
        guard: str | None = None,
        window: int = 400,
        **kwargs: Any,
    ) -> None:
        if not hasattr(CustomGuardrail, "use_native_lifecycle_hooks"):
            raise TypeError("this version of LiteLLM would run its own hooks: install a newer one")
        hooks = [GuardrailEventHooks.pre_call, GuardrailEventHooks.during_call, GuardrailEventHooks.post_call]
        super().__init__(timeout=timeout, supported_event_hooks=hooks, **kwargs)
        self.client = GuardClient(api_base, api_key, timeout, on_error=on_error, guard=guard)
        self._window = window

    @log_guardrail_information
    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: Any
    ) -> None:
        """Judge the request before the model is called."""
        post_call = GuardrailEventHooks.post_call
        if data.get("stream") and "proxy_server_request" not in data and self.should_run_guardrail(data, post_call):
            message = "outside its proxy LiteLLM does not hold back streamed answers: do not stream, or use the proxy"
            self._refuse(unjudged("unheld_stream", message))
        await self._check_request(data, call_type)

    @log_guardrail_information
    async def async_moderation_hook(self, data: dict[str, Any], user_api_key_dict: Any, call_type: Any) -> None:
        """Judge the request while the model is answering."""
        await self._check_request(data, call_type)

    @log_guardrail_information
    async def async_post_call_success_hook(self, data: dict[str, Any], user_api_key_dict: Any, response: Any) -> None:
        """Judge each answer in its conversation."""
        if not isinstance(response, EmbeddingResponse):  # embeddings hold no text
            self._obey(await self._judged(lambda: (_conversation(data), _parts_of_answers(response))))

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """Release a streamed answer window by window, each window after its verdict."""
        answers = StreamedAnswers()

        async def judge() -> Verdict:
            return await self._judged(lambda: (_conversation(request_data), answers.parts))

        buffer: StreamBuffer[Any] = StreamBuffer(judge, self._window)
        async for chunk in response:
            before = answers.characters
            self._read(answers, chunk)
            for released in await buffer.add(chunk, answers.characters - before, whole=answers.whole):
                yield released
            self._obey(buffer.verdict)
        before = answers.characters
        self._read(answers, None)
        for released in [*await buffer.add(None, answers.characters - before, whole=True), *await buffer.finish()]:
            if released is not None:
                yield released
        self._obey(buffer.verdict)

    async def apply_guardrail(
        self,
        inputs: Any,
        request_data: dict[str, Any],
        input_type: Target,
        logging_obj: Any = None,
    ) -> Any:
        """LiteLLM's interface for texts, images and calls: return the inputs unchanged, or raise a refusal.

        Called by `/guardrails/apply_guardrail` and by LiteLLM's translated routes; the proxy's other routes run the
        hooks above.
        """

        def read_inputs() -> tuple[list[dict[str, Any]], list[list[Part]]]:
            contents = {name: _as_json_data(inputs.get(name)) for name in ("texts", "images", "tool_calls")}
            messages = _as_json_data(inputs.get("structured_messages"))
            if input_type == "response" and not messages and any(request_data.get(name) for name in _INPUT_FIELDS):
                return [*_conversation(request_data), *merge_inputs(input_type, None, **contents)], []
            return merge_inputs(input_type, messages, **contents), []

        self._obey(await self._judged(read_inputs))
        return inputs

    async def async_logging_hook(self, kwargs: Any, result: Any, call_type: Any) -> tuple[Any, Any]:
        """Return the arguments unchanged: what LiteLLM logs was judged before."""
        return kwargs, result

    async def _check_request(self, data: dict[str, Any], call_type: Any) -> None:
        kind = getattr(call_type, "value", call_type)
        if kind is not None and kind not in _CALLS:
            self._refuse(_UNKNOWN)
        self._obey(await self._judged(lambda: (_conversation(data), [])))

    async def _judged(self, read: Callable[[], tuple[list[dict[str, Any]], list[list[Part]]]]) -> Verdict:
        """Judge a conversation with each of its answers, or alone if it has none; return a block if there is one.

        `read` returns the messages and the answers' parts; its `InputError` becomes an error verdict.
        """
        try:
            messages, answers = read()
        except InputError as error:
            return unjudged(error.code, str(error))
        conversations = [[*messages, {"role": "assistant", "content": parts}] for parts in answers] or [messages]
        verdicts = await gather_or_cancel(self.client.ajudge(messages=conversation) for conversation in conversations)
        return next((verdict for verdict in verdicts if verdict.action == "block"), verdicts[0])

    def _read(self, answers: StreamedAnswers, chunk: Any) -> None:
        try:
            if chunk is None:
                answers.finish()
            elif isinstance(chunk, (bytes, str)):
                answers.feed(chunk if isinstance(chunk, bytes) else chunk.encode())
            elif isinstance(chunk, (ModelResponseStream, TextCompletionResponse)):
                answers.chunk(_as_json_data(chunk))
            elif isinstance(chunk, (BaseModel, dict)):
                answers.event(_as_json_data(chunk))
            else:
                self._refuse(_UNKNOWN)
        except (UnsupportedContentError, TooLongError) as error:
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
    """The content of a request as chat messages. Raises `InputError` if it is neither messages nor texts."""
    first, *others = [data[name] for name in _INPUT_FIELDS if data.get(name)] or [None]
    if isinstance(first, dict):  # a prompt stored at the provider, with its variables
        first, others = [], [first, *others]
    elif not isinstance(first, (str, list)):
        raise _UnknownCallError("the request contains no messages: send messages, input or prompt")
    other_parts = [part for content in others for message in _messages(content) for part in message["content"]]
    return with_user_parts(
        messages_of(first), [*other_parts, *parts_of([data.get(name) for name in _OTHER_INPUT_FIELDS])]
    )


def _messages(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": parts_of(content)}] if isinstance(content, dict) else messages_of(content)


def _parts_of_answers(response: Any) -> list[list[Part]]:
    """The parts of each answer to judge. Raises `InputError` for an unknown kind of answer."""
    content = _as_json_data(response)
    if isinstance(response, (ModelResponse, TextCompletionResponse)):
        if isinstance(response, TextCompletionResponse) and any(
            not isinstance(choice.get("text"), str) for choice in content["choices"]
        ):
            raise _UnknownCallError("a choice of the answer has no text: use chat completions")
        return completion_parts(content)
    if (
        isinstance(content, dict)
        and isinstance(content.get("content"), list)
        and content.get("role", "assistant") == "assistant"
    ):
        return [message_parts(content)]
    if isinstance(content, dict) and content.get("object") == "response" and isinstance(content.get("output"), list):
        return [response_parts(content)]
    raise _UnknownCallError("this kind of answer cannot be judged: use chat or text completions, messages or responses")


def _as_json_data(value: Any) -> Any:
    """LiteLLM's objects as JSON data."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", warnings=False)  # LiteLLM sets fields that its types do not declare
    if isinstance(value, dict):
        return {name: _as_json_data(part) for name, part in value.items()}
    return [_as_json_data(part) for part in value] if isinstance(value, (list, tuple)) else value
