"""The guard service as the model of NeMo Guardrails' content-safety flows.

    models:                                       rails:
      - type: guardreasoner                         input:
        engine: guardreasoner                         flows:
        model: default                                  - content safety check input $model=guardreasoner
        parameters:                                   output:
          base_url: http://127.0.0.1:8800               flows:
                                                          - content safety check output $model=guardreasoner

The prompts of the two checks contain the conversation and name the output parser `guardreasoner`
(`examples/integrations/nemo`). A `config.py` in the same folder imports this module's `init`:
`from guardreasoner_vl.integrations.nemo import init`. With `passthrough: true` NeMo does not apply these rails to tool
calls and their results; the flows in the example's `tools.co` judge them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemoguardrails.library.content_safety.actions import content_safety_check_output
from nemoguardrails.llm.providers import register_provider
from nemoguardrails.types import LLMResponse, LLMResponseChunk

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.remote.client import DEFAULT_URL, GuardClient, blocked_reason, unjudged
from guardreasoner_vl.service.conversation import messages_of
from guardreasoner_vl.types import Verdict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from nemoguardrails import LLMRails
    from nemoguardrails.types import ChatMessage

    from guardreasoner_vl.choices import Action

NAME = "guardreasoner"


def init(app: LLMRails) -> None:
    """Register the model, parser and actions; NeMo calls this before it loads the models of a configuration."""
    register_provider(NAME, GuardModel)
    app.register_output_parser(read_nemo_verdict, NAME)
    app.register_action(check_output, "content_safety_check_output")
    app.register_action(check_tools, "guardreasoner_check_tools")


async def check_output(
    llms: dict[str, Any],
    llm_task_manager: Any,
    model_name: str | None = None,
    context: dict[str, Any] | None = None,
    bot_message: str | None = None,
    events: list[dict[str, Any]] | None = None,
    **rest: Any,
) -> Any:
    """NeMo's own check of an answer, extended to the model's reasoning, which NeMo shows before the answer."""
    variables = context or {}
    answer = variables.get("bot_message", "") if bot_message is None else bot_message
    judged_text = "\n\n".join(text for text in (variables.get("bot_thinking"), answer) if text)
    outcome = await content_safety_check_output(
        llms, llm_task_manager, model_name=model_name, context=context, bot_message=judged_text, **rest
    )
    if outcome.is_blocked:
        _redact(events or (), "BotThinking", "content")
    return outcome


async def check_tools(
    llms: dict[str, Any],
    context: dict[str, Any],
    events: list[dict[str, Any]],
    tool_calls: list[dict[str, Any]] | None = None,
    tool_result: Any = None,
) -> bool:
    """Whether the guard allows tool calls, or the result of one; the example's `tools.co` runs this action."""
    guard: GuardModel = llms[NAME]
    messages = [{"role": "user", "content": context["user_message"]}] if context.get("user_message") else []
    if tool_calls is None:
        messages.append({"role": "tool", "content": tool_result})
    else:
        messages.append({"role": "assistant", "content": context.get("bot_thinking"), "tool_calls": tool_calls})
    allowed = (await guard.verdict(messages)).action == "allow"
    if not allowed:
        _redact(events, "BotToolCalls", "tool_calls")
        _redact(events, "BotThinking", "content")
    return allowed


def _redact(events: Iterable[dict[str, Any]], kind: str, field: str) -> None:
    """Clear a field of the events; NeMo returns them even if the rails blocked the answer."""
    for event in events:
        if event.get("type") == kind:
            event[field] = None


def read_nemo_verdict(output: str) -> list[bool | str]:
    """`[True]`, or `[False, reason]`; anything but a verdict counts as unsafe."""
    try:
        verdict = Verdict.model_validate_json(output)
    except ValueError:
        return [False, "the guard gave no verdict"]
    return [True] if verdict.action == "allow" else [False, blocked_reason(verdict)]


class GuardModel:
    """The guard as a NeMo model: its answer to a conversation is the verdict as JSON.

    `model` is one of the service's guards; NeMo's sampling parameters are ignored.
    """

    provider_name = NAME

    def __init__(
        self,
        model: str = "default",
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        timeout: float = 150.0,
        on_error: Action = "block",
    ) -> None:
        self.model_name, self.provider_url = model, base_url
        self._guard = GuardClient(base_url, api_key, timeout, guard=model, on_error=on_error)

    async def generate_async(
        self,
        prompt: str | list[ChatMessage],
        *,
        stop: list[str] | None = None,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> LLMResponse:
        """The verdict as JSON."""
        if isinstance(prompt, str):
            verdict = await self._guard.ajudge(prompt)
        else:
            verdict = await self.verdict([message.to_dict() for message in prompt])
        return LLMResponse(verdict.model_dump_json(), model=self.model_name, finish_reason="stop")

    async def verdict(self, messages: list[dict[str, Any]]) -> Verdict:
        """Judge all content of the messages."""
        try:
            conversation = messages_of(messages)
        except InputError as error:
            return unjudged(error.code, str(error))
        return await self._guard.ajudge(messages=conversation)

    async def stream_async(
        self, prompt: str | list[ChatMessage], *, stop: list[str] | None = None, **kwargs: Any
    ) -> AsyncIterator[LLMResponseChunk]:
        """The verdict as JSON, in one chunk."""
        whole = await self.generate_async(prompt, stop=stop, **kwargs)
        yield LLMResponseChunk(delta_content=whole.content, model=self.model_name, finish_reason="stop")

    async def aclose(self) -> None:
        """Close the connections to the service."""
        await self._guard.aclose()
