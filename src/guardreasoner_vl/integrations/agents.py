"""Guardrails for the OpenAI Agents SDK.

    agent = Agent(
        name="helper",
        input_guardrails=[guard_input(client)],
        output_guardrails=[guard_output(client)],
        hooks=GuardHooks(client),
    )

The SDK runs the input guardrails of an agent on the user's input and the output guardrails on its final output.
`GuardHooks` judges what is between them, before and after each model call: results of tools, and everything that the
model writes (reasoning, tool calls, built-in tools).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from agents import (
    AgentHooks,
    GuardrailFunctionOutput,
    InputGuardrail,
    InputGuardrailResult,
    InputGuardrailTripwireTriggered,
    OutputGuardrail,
    OutputGuardrailResult,
    OutputGuardrailTripwireTriggered,
)
from pydantic import TypeAdapter

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.remote.client import GuardClient, unjudged
from guardreasoner_vl.service.conversation import messages_of

if TYPE_CHECKING:
    from agents import Agent, ModelResponse, RunContextWrapper, TResponseInputItem

    from guardreasoner_vl.types import Verdict

NAME = "guardreasoner"
_UNREADABLE = unjudged("unreadable", "an item has an unknown form and cannot be judged: use text and images")


def guard_input(guard: GuardClient) -> InputGuardrail[Any]:
    """An input guardrail that finishes before the agent starts; by default the SDK would run both in parallel."""

    async def judge(
        context: RunContextWrapper[Any],  # noqa: ARG001
        agent: Agent[Any],  # noqa: ARG001
        agent_input: str | list[TResponseInputItem],
    ) -> GuardrailFunctionOutput:
        return await _guarded(guard, agent_input)

    return InputGuardrail(judge, name=NAME, run_in_parallel=False)


def guard_output(guard: GuardClient) -> OutputGuardrail[Any]:
    """An output guardrail that judges the final output in its conversation; a structured output is judged as JSON."""

    async def judge(context: RunContextWrapper[Any], agent: Agent[Any], output: Any) -> GuardrailFunctionOutput:  # noqa: ARG001
        return await _guarded(guard, context.turn_input, output)

    return OutputGuardrail(judge, name=NAME)


class GuardHooks(AgentHooks[Any]):
    """Judges the input of each model call, results of tools included, and everything in its output.

    A block raises the SDK's tripwire exceptions before tools are called.
    """

    def __init__(self, guard: GuardClient) -> None:
        self._guard = guard

    async def on_llm_start(
        self,
        context: RunContextWrapper[Any],  # noqa: ARG002
        agent: Agent[Any],  # noqa: ARG002
        system_prompt: str | None,  # noqa: ARG002
        input_items: list[TResponseInputItem],
    ) -> None:
        """Judge the input of a model call. Raises `InputGuardrailTripwireTriggered` for a block."""
        output = await _guarded(self._guard, input_items)
        if output.tripwire_triggered:
            raise InputGuardrailTripwireTriggered(InputGuardrailResult(guard_input(self._guard), output))

    async def on_llm_end(self, context: RunContextWrapper[Any], agent: Agent[Any], response: ModelResponse) -> None:
        """Judge the output of a model call after its input. Raises `OutputGuardrailTripwireTriggered` for a block."""
        output = await _guarded(self._guard, [*_items(context.turn_input), *response.output])
        if output.tripwire_triggered:
            result = OutputGuardrailResult(guard_output(self._guard), None, agent, output)
            raise OutputGuardrailTripwireTriggered(result)


def _items(agent_input: str | list[TResponseInputItem]) -> list[Any]:
    return [agent_input] if isinstance(agent_input, str) else list(agent_input)


async def _guarded(guard: GuardClient, items: Any, output: Any = None) -> GuardrailFunctionOutput:
    """Judge the items, then the output; the result's `output_info` is the verdict."""
    try:
        messages = messages_of(_as_json_data(items))
        if output is not None:
            messages += messages_of([{"role": "assistant", "content": _output_text(output)}])
    except (InputError, ValueError, TypeError):
        verdict: Verdict = _UNREADABLE
    else:
        verdict = await guard.ajudge(messages=messages)
    return GuardrailFunctionOutput(verdict, tripwire_triggered=verdict.action == "block")


def _output_text(output: Any) -> str:
    return output if isinstance(output, str) else json.dumps(_as_json_data(output))


def _as_json_data(value: Any) -> Any:
    """The value as JSON data; the SDK may pass objects."""
    return TypeAdapter(Any).dump_python(value, mode="json")
