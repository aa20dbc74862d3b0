"""Guardrails for the OpenAI Agents SDK.

    agent = Agent(
        name="helper",
        input_guardrails=[guard_input(client)],
        output_guardrails=[guard_output(client)],
        hooks=GuardHooks(client),
    )

The SDK runs an agent's input guardrails on what its user sent and the output guardrails on its final output. What is
between them, the results of tools and all that a model says (reasoning, calls of tools, built-in tools), `GuardHooks`
judges before and after each call of the model.
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
_UNREADABLE = unjudged("unreadable", "an item is in no form that can be judged: use text and images")


def guard_input(guard: GuardClient) -> InputGuardrail[Any]:
    """Trips before the agent starts: with the SDK's default it would run, tools and all, beside the judgement."""

    async def judge(
        context: RunContextWrapper[Any],  # noqa: ARG001
        agent: Agent[Any],  # noqa: ARG001
        given: str | list[TResponseInputItem],
    ) -> GuardrailFunctionOutput:
        return await _decided(guard, given)

    return InputGuardrail(judge, name=NAME, run_in_parallel=False)


def guard_output(guard: GuardClient) -> OutputGuardrail[Any]:
    """Trips on a final output that is harmful in its conversation; a structured one is judged as JSON."""

    async def judge(context: RunContextWrapper[Any], agent: Agent[Any], output: Any) -> GuardrailFunctionOutput:  # noqa: ARG001
        return await _decided(guard, context.turn_input, output)

    return OutputGuardrail(judge, name=NAME)


class GuardHooks(AgentHooks[Any]):
    """Judges what goes into each call of the model, results of tools included, and all that comes out of it.

    A block raises the SDK's tripwire exceptions, before tools are called.
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
        output = await _decided(self._guard, input_items)
        if output.tripwire_triggered:
            raise InputGuardrailTripwireTriggered(InputGuardrailResult(guard_input(self._guard), output))

    async def on_llm_end(self, context: RunContextWrapper[Any], agent: Agent[Any], response: ModelResponse) -> None:
        output = await _decided(self._guard, [*_items(context.turn_input), *response.output])
        if output.tripwire_triggered:
            result = OutputGuardrailResult(guard_output(self._guard), None, agent, output)
            raise OutputGuardrailTripwireTriggered(result)


def _items(given: str | list[TResponseInputItem]) -> list[Any]:
    return [given] if isinstance(given, str) else list(given)


async def _decided(guard: GuardClient, given: Any, output: Any = None) -> GuardrailFunctionOutput:
    """`output_info` is the verdict."""
    try:
        messages = messages_of(_plain(given))
        if output is not None:
            messages += messages_of([{"role": "assistant", "content": _text(output)}])
    except (InputError, ValueError, TypeError):
        verdict: Verdict = _UNREADABLE
    else:
        verdict = await guard.ajudge(messages=messages)
    return GuardrailFunctionOutput(verdict, tripwire_triggered=verdict.action == "block")


def _text(output: Any) -> str:
    return output if isinstance(output, str) else json.dumps(_plain(output))


def _plain(value: Any) -> Any:
    """As JSON has it; the SDK hands over objects, too."""
    return TypeAdapter(Any).dump_python(value, mode="json")
