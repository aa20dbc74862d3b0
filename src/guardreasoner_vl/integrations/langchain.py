"""A guard in a LangChain agent: before each call of the model, tool results included, and after it.

    agent = create_agent(model, tools, middleware=[GuardReasonerMiddleware(GuardClient())])

A block ends the run with a refusal, which takes the place of a refused answer, so that its tools are not called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain.agents.middleware import AgentMiddleware, hook_config
from langchain_core.messages import AIMessage, AnyMessage
from pydantic import TypeAdapter

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.remote.client import GuardClient, blocked_reason, unjudged
from guardreasoner_vl.service.conversation import messages_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain.agents.middleware import AgentState
    from langgraph.runtime import Runtime

    from guardreasoner_vl.types import Verdict

_UNREADABLE = unjudged("unreadable", "a message is in no form that can be judged: use text and images")
_ROLES = {"human": "user", "ai": "assistant"}
_VENDORS = ("reasoning_content", "reasoning", "function_call", "refusal", "images", "audio")
_UNSAID = ("type", "id", "tool_call_id", "usage_metadata", "example", "artifact", "status", "chunk_position")
"""What goes to no model and comes from none; `artifact` is what a tool keeps for the application."""
_METADATA = (
    *("token_usage", "usage", "model", "model_name", "model_provider", "system_fingerprint", "finish_reason"),
    *("stop_reason", "stop_sequence", "id", "logprobs", "service_tier", "created", "created_at", "object", "status"),
    *("guard", "safety_ratings", "prompt_feedback", "done", "done_reason", "total_duration", "load_duration"),
    *("prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration", "ResponseMetadata", "metrics"),
)
"""What vendors say about an answer, and the guard's own verdict. Anything else may be of the answer itself."""


class GuardReasonerMiddleware(AgentMiddleware):
    """Has the guard service judge what goes into the model and what comes out of it."""

    def __init__(self, guard: GuardClient) -> None:
        super().__init__()
        self._guard = guard

    @hook_config(can_jump_to=["end"])
    def before_model(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        return _decided(self._verdict(state), None)

    @hook_config(can_jump_to=["end"])
    async def abefore_model(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        return _decided(await self._averdict(state), None)

    @hook_config(can_jump_to=["end"])
    def after_model(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        return _decided(self._verdict(state), state["messages"][-1].id)

    @hook_config(can_jump_to=["end"])
    async def aafter_model(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        return _decided(await self._averdict(state), state["messages"][-1].id)

    def _verdict(self, state: AgentState[Any]) -> Verdict:
        messages = chat_messages(state["messages"])
        return _UNREADABLE if messages is None else self._guard.judge(messages=messages)

    async def _averdict(self, state: AgentState[Any]) -> Verdict:
        messages = chat_messages(state["messages"])
        return _UNREADABLE if messages is None else await self._guard.ajudge(messages=messages)


def _decided(verdict: Verdict, replaced: str | None) -> dict[str, Any] | None:
    """A message with the id of an earlier one takes its place."""
    if verdict.action == "allow":
        return None
    told = {"finish_reason": "content_filter", "guard": verdict.model_dump(mode="json")}
    refusal = AIMessage(blocked_reason(verdict), id=replaced, response_metadata=told)
    return {"messages": [refusal], "jump_to": "end"}


def chat_messages(messages: Sequence[AnyMessage]) -> list[dict[str, Any]] | None:
    """The messages as the guard judges them, all that they hold; None for what cannot be judged."""
    try:
        return messages_of([_message(message) for message in messages if message.type != "remove"])
    except (InputError, ValueError, TypeError):
        return None


def _message(message: AnyMessage) -> dict[str, Any]:
    """In OpenAI's shape, with all that LangChain has beside it."""
    held = TypeAdapter(Any).dump_python(dict(message), mode="json")
    vendors, metadata = held.pop("additional_kwargs"), held.pop("response_metadata")
    return {
        **{name: value for name, value in held.items() if name not in _UNSAID},
        "role": _ROLES.get(held["type"], held.get("role") or held["type"]),
        **{name: vendors.pop(name) for name in _VENDORS if name in vendors},
        "tool_calls": [*(held.get("tool_calls") or ()), *(vendors.pop("tool_calls", None) or ())],
        "additional_kwargs": vendors,
        "response_metadata": {name: value for name, value in metadata.items() if name not in _METADATA},
    }
