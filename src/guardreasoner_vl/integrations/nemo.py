"""NeMo Guardrails' content-safety flows with the guard service as their model.

    models:                                       rails:
      - type: guardreasoner                         input:
        engine: guardreasoner                         flows:
        model: default                                  - content safety check input $model=guardreasoner
        parameters:                                   output:
          base_url: http://127.0.0.1:8800               flows:
                                                          - content safety check output $model=guardreasoner

The prompts of the two checks hand the conversation over and name the output parser `guardreasoner`
(`examples/integrations/nemo`). A `config.py` beside them holds: `from guardreasoner_vl.integrations.nemo import init`.
With `passthrough: true` NeMo passes calls of tools and their results on past these rails: the flows in the example's
`tools.co` judge them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

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

NAME = "guardreasoner"


def init(app: LLMRails) -> None:
    """What NeMo calls before it loads the models of a configuration."""
    register_provider(NAME, GuardModel)
    app.register_output_parser(parse_verdict, NAME)
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
    """NeMo's own check of an answer, and of the model's reasoning, which NeMo tells before the answer."""
    held = context or {}
    said = held.get("bot_message", "") if bot_message is None else bot_message
    shown = "\n\n".join(text for text in (held.get("bot_thinking"), said) if text)
    outcome = await content_safety_check_output(
        llms, llm_task_manager, model_name=model_name, context=context, bot_message=shown, **rest
    )
    if outcome.is_blocked:
        _take_back(events or (), "BotThinking", "content")
    return outcome


async def check_tools(
    llms: dict[str, Any],
    context: dict[str, Any],
    events: list[dict[str, Any]],
    tool_calls: list[dict[str, Any]] | None = None,
    tool_result: Any = None,
) -> bool:
    """Whether calls of tools, or the result of one, may go on; `tools.co` of the example executes it."""
    guard: GuardModel = llms[NAME]
    said = [{"role": "user", "content": context["user_message"]}] if context.get("user_message") else []
    if tool_calls is None:
        said.append({"role": "tool", "content": tool_result})
    else:
        said.append({"role": "assistant", "content": context.get("bot_thinking"), "tool_calls": tool_calls})
    allowed = (await guard.verdict(said)).action == "allow"
    if not allowed:
        _take_back(events, "BotToolCalls", "tool_calls")
        _take_back(events, "BotThinking", "content")
    return allowed


def _take_back(events: Iterable[dict[str, Any]], kind: str, field: str) -> None:
    """NeMo hands these over even where the rails have blocked the answer."""
    for event in events:
        if event.get("type") == kind:
            event[field] = None


def parse_verdict(output: str) -> list[bool | str]:
    """`[True]`, or `[False, reason]`; what is no verdict is not safe."""
    try:
        verdict = Verdict.model_validate_json(output)
    except ValueError:
        return [False, "the guard gave no verdict"]
    return [True] if verdict.action == "allow" else [False, blocked_reason(verdict)]


class GuardModel:
    """What NeMo takes for a model: its answer to a conversation is the verdict about it, as JSON.

    `model` is one of the service's guards; how NeMo would have a model sample is left alone.
    """

    provider_name = NAME

    def __init__(
        self,
        model: str = "default",
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        timeout: float = 120.0,
        on_error: Literal["block", "allow"] = "block",
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
        """The verdict."""
        if isinstance(prompt, str):
            verdict = await self._guard.ajudge(prompt)
        else:
            verdict = await self.verdict([message.to_dict() for message in prompt])
        return LLMResponse(verdict.model_dump_json(), model=self.model_name, finish_reason="stop")

    async def verdict(self, messages: list[dict[str, Any]]) -> Verdict:
        """The verdict on all that the messages hold."""
        try:
            said = messages_of(messages)
        except InputError as error:
            return unjudged(error.code, str(error))
        return await self._guard.ajudge(messages=said)

    async def stream_async(
        self, prompt: str | list[ChatMessage], *, stop: list[str] | None = None, **kwargs: Any
    ) -> AsyncIterator[LLMResponseChunk]:
        """The verdict in one piece."""
        whole = await self.generate_async(prompt, stop=stop, **kwargs)
        yield LLMResponseChunk(delta_content=whole.content, model=self.model_name, finish_reason="stop")
