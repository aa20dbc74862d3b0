"""LangChain middleware that judges before each model call of an agent, tool results included, and after it.

    agent = create_agent(model, tools, middleware=[GuardReasonerMiddleware(GuardClient())])

A block ends the run with a refusal. After a model call the refusal replaces the answer, so that no tool is called.
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

_UNREADABLE = unjudged("unreadable", "a message has an unknown form and cannot be judged: use text and images")
_ROLES = {"human": "user", "ai": "assistant"}
_VENDORS = ("reasoning_content", "reasoning", "function_call", "refusal", "images", "audio")
_UNSAID = ("type", "id", "tool_call_id", "usage_metadata", "example", "artifact", "status", "chunk_position")
"""Fields that no model reads or writes; `artifact` is a tool's data for the application."""
_METADATA = (
    *("token_usage", "usage", "model", "model_name", "model_provider", "system_fingerprint", "finish_reason"),
    *("stop_reason", "stop_sequence", "id", "logprobs", "service_tier", "created", "created_at", "object", "status"),
    *("guard", "safety_ratings", "prompt_feedback", "done", "done_reason", "total_duration", "load_duration"),
    *("prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration", "ResponseMetadata", "metrics"),
)
"""Vendors' metadata about an answer, and the guard's own verdict; any other field may be part of the answer."""


class GuardReasonerMiddleware(AgentMiddleware):
    """Has the guard service judge the input and the output of each model call."""

    def __init__(self, guard: GuardClient) -> None:
        super().__init__()
        self._guard = guard

    @hook_config(can_jump_to=["end"])
    def before_model(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        """Judge the input of a model call; returns the end of the run for a block, else None."""
        return _state_update(self._verdict(state), None)

    @hook_config(can_jump_to=["end"])
    async def abefore_model(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        """`before_model` without blocking the event loop."""
        return _state_update(await self._averdict(state), None)

    @hook_config(can_jump_to=["end"])
    def after_model(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        """Judge the output of a model call; for a block a refusal replaces it and ends the run."""
        return _state_update(self._verdict(state), state["messages"][-1].id)

    @hook_config(can_jump_to=["end"])
    async def aafter_model(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        """`after_model` without blocking the event loop."""
        return _state_update(await self._averdict(state), state["messages"][-1].id)

    def _verdict(self, state: AgentState[Any]) -> Verdict:
        messages = chat_messages(state["messages"])
        return _UNREADABLE if messages is None else self._guard.judge(messages=messages)

    async def _averdict(self, state: AgentState[Any]) -> Verdict:
        messages = chat_messages(state["messages"])
        return _UNREADABLE if messages is None else await self._guard.ajudge(messages=messages)


def _state_update(verdict: Verdict, replaced_id: str | None) -> dict[str, Any] | None:
    """The agent's new state after a block; the refusal replaces the message with the id `replaced_id`."""
    if verdict.action == "allow":
        return None
    metadata = {"finish_reason": "content_filter", "guard": verdict.model_dump(mode="json")}
    refusal = AIMessage(blocked_reason(verdict), id=replaced_id, response_metadata=metadata)
    return {"messages": [refusal], "jump_to": "end"}


def chat_messages(messages: Sequence[AnyMessage]) -> list[dict[str, Any]] | None:
    """The messages with all their content in the form that is judged; None if they cannot be judged."""
    try:
        return messages_of([_openai_message(message) for message in messages if message.type != "remove"])
    except (InputError, ValueError, TypeError):
        return None


def _openai_message(message: AnyMessage) -> dict[str, Any]:
    """A message in OpenAI's format, with LangChain's additional fields."""
    fields = TypeAdapter(Any).dump_python(dict(message), mode="json")
    vendors, metadata = fields.pop("additional_kwargs"), fields.pop("response_metadata")
    return {
        **{name: value for name, value in fields.items() if name not in _UNSAID},
        "role": _ROLES.get(fields["type"], fields.get("role") or fields["type"]),
        **{name: vendors.pop(name) for name in _VENDORS if name in vendors},
        "tool_calls": [*(fields.get("tool_calls") or ()), *(vendors.pop("tool_calls", None) or ())],
        "additional_kwargs": vendors,
        "response_metadata": {name: value for name, value in metadata.items() if name not in _METADATA},
    }
