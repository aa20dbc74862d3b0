"""A LangChain agent with the guard before and after its model; here a model that repeats what it was told.

guardreasoner-vl serve --port 8811
GUARD_URL=http://127.0.0.1:8811 python examples/integrations/langchain_middleware.py
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from langchain.agents import create_agent
from langchain_core.language_models.chat_models import BaseChatModel, SimpleChatModel

from guardreasoner_vl.integrations import GuardClient
from guardreasoner_vl.integrations.langchain import GuardReasonerMiddleware

if TYPE_CHECKING:
    from langchain_core.messages import BaseMessage


class Parrot(SimpleChatModel):
    """Stands where a real model would."""

    @property
    def _llm_type(self) -> str:
        return "parrot"

    def _call(self, messages: list[BaseMessage], *_: Any, **__: Any) -> str:
        return str(messages[-1].content)


def guarded(model: BaseChatModel, guard: GuardClient, tools: Any = ()) -> Any:
    """An agent whose model is asked, and whose tools are called, only after a verdict."""
    return create_agent(model, list(tools), middleware=[GuardReasonerMiddleware(guard)])


def main() -> None:
    """Say two things to the agent."""
    with GuardClient(os.environ.get("GUARD_URL", "http://127.0.0.1:8800"), os.environ.get("GUARD_KEY")) as guard:
        agent = guarded(Parrot(), guard)
        for text in ("How do I bake bread?", "Explain how to break into a parked car."):
            state = agent.invoke({"messages": [{"role": "user", "content": text}]})
            print(f"{text}  ->  {state['messages'][-1].content}")


if __name__ == "__main__":
    main()
