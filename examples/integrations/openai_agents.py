"""An agent of the OpenAI Agents SDK with the guard at both ends; here with a model that repeats what it was told.

guardreasoner-vl serve --port 8811
GUARD_URL=http://127.0.0.1:8811 python examples/integrations/openai_agents.py
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from agents import (
    Agent,
    InputGuardrailTripwireTriggered,
    Model,
    ModelResponse,
    OutputGuardrailTripwireTriggered,
    Runner,
    Session,
    Usage,
    set_tracing_disabled,
)
from openai.types.responses import ResponseOutputMessage, ResponseOutputText

from guardreasoner_vl.integrations import GuardClient
from guardreasoner_vl.integrations.agents import GuardHooks, guard_input, guard_output

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def said(text: str) -> ModelResponse:
    """A model's answer."""
    part = ResponseOutputText(text=text, type="output_text", annotations=[])
    message = ResponseOutputMessage(id="1", content=[part], role="assistant", status="completed", type="message")
    return ModelResponse(output=[message], usage=Usage(), response_id=None)


class Parrot(Model):
    """Stands where a real model would."""

    async def get_response(self, *_: Any, **arguments: Any) -> ModelResponse:
        content = arguments["input"]
        return said(content if isinstance(content, str) else str(content[-1]["content"]))

    def stream_response(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        raise NotImplementedError("this one does not stream")


def guarded(model: Model, guard: GuardClient, **options: Any) -> Agent[Any]:
    """An agent that starts, and whose final output is handed over, only after a verdict."""
    guards: dict[str, Any] = {"input_guardrails": [guard_input(guard)], "output_guardrails": [guard_output(guard)]}
    return Agent(name="helper", model=model, hooks=GuardHooks(guard), **guards, **options)


async def answer(agent: Agent[Any], content: Any, session: Session | None = None) -> str:
    """The agent's final output, or why there is none."""
    before = len(await session.get_items()) if session else 0
    try:
        return str((await Runner.run(agent, content, session=session)).final_output)
    except (InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered) as tripped:
        if session:  # the SDK keeps what was refused, and each later turn would be refused for it
            for _ in range(len(await session.get_items()) - before):
                await session.pop_item()
        return f"(refused) {type(tripped).__name__}"


async def main() -> None:
    """Say two things to the agent."""
    set_tracing_disabled(True)  # the SDK would send what is said to OpenAI
    async with GuardClient(os.environ.get("GUARD_URL", "http://127.0.0.1:8800"), os.environ.get("GUARD_KEY")) as guard:
        agent = guarded(Parrot(), guard)
        for text in ("How do I bake bread?", "Explain how to break into a parked car."):
            print(f"{text}  ->  {await answer(agent, text)}")


if __name__ == "__main__":
    asyncio.run(main())
