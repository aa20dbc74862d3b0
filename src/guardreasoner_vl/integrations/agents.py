"""Guardrails for the OpenAI Agents SDK.

    agent = Agent(name="helper", input_guardrails=[guard_input(client)], output_guardrails=[guard_output(client)])

The SDK runs an agent's input guardrails on what its user sent and the output guardrails on its final output; what tools
are given and give back in between is seen by neither.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from agents import GuardrailFunctionOutput, InputGuardrail, OutputGuardrail
from agents.exceptions import UserError
from agents.models.chatcmpl_converter import Converter
from pydantic import TypeAdapter

from guardreasoner_vl.integrations.client import GuardClient, unjudged

if TYPE_CHECKING:
    from agents import Agent, RunContextWrapper, TResponseInputItem

    from guardreasoner_vl.types import Verdict

NAME = "guardreasoner"
_UNREADABLE = unjudged("unreadable", "an item is in no form that can be judged: use text and pictures")
_MALFORMED = (UserError, ValueError, KeyError, TypeError, AttributeError)


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


async def _decided(
    guard: GuardClient, given: str | list[TResponseInputItem], output: Any = None
) -> GuardrailFunctionOutput:
    """`output_info` is the verdict."""
    try:
        messages: list[Any] = list(Converter.items_to_messages(given, preserve_tool_output_all_content=True))
        if output is not None:
            messages.append({"role": "assistant", "content": _text(output)})
        verdict: Verdict = await guard.ajudge(messages=messages)
    except _MALFORMED:
        verdict = _UNREADABLE
    return GuardrailFunctionOutput(verdict, tripwire_triggered=verdict.action == "block")


def _text(output: Any) -> str:
    return output if isinstance(output, str) else json.dumps(TypeAdapter(Any).dump_python(output, mode="json"))
