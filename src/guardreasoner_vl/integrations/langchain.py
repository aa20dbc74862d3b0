"""A guard in a LangChain agent: before each call of the model, tool results included, and after it.

    agent = create_agent(model, tools, middleware=[GuardReasonerMiddleware(GuardClient())])

A block ends the run with a refusal, which takes the place of a refused answer, so that its tools are not called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain.agents.middleware import AgentMiddleware, hook_config
from langchain_core.messages import AIMessage, AnyMessage, convert_to_openai_messages

from guardreasoner_vl.integrations.client import GuardClient, blocked_reason, unjudged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain.agents.middleware import AgentState
    from langgraph.runtime import Runtime

    from guardreasoner_vl.types import Verdict

_UNREADABLE = unjudged("unreadable", "a message is in no form that can be judged: use text and pictures")


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
    """In OpenAI's shape; None for what LangChain cannot bring into it."""
    try:
        made: list[dict[str, Any]] = convert_to_openai_messages(messages)
        for message in made:
            if isinstance(message["content"], list):
                message["content"] = [_judged_part(part) for part in message["content"] if not _is_told_twice(part)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return made


def _is_told_twice(part: dict[str, Any]) -> bool:
    """The Responses API puts a call among the content too; it stands in `tool_calls` already."""
    return part.get("type") == "function_call"


def _judged_part(part: dict[str, Any]) -> dict[str, Any]:
    """Reasoning that is shown counts as text; what is unknown stays, for the service to refuse."""
    if part.get("type") not in ("thinking", "reasoning"):
        return part
    summary = "\n".join(one["text"] for one in part.get("summary") or ())
    return {"type": "text", "text": part.get("thinking") or part.get("reasoning") or summary}
