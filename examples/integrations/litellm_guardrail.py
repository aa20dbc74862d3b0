"""LiteLLM with the guard before and after its models, through the library; `litellm_config.yaml` is for its proxy.

    guardreasoner-vl serve --port 8811
    GUARD_URL=http://127.0.0.1:8811 LITELLM_LOCAL_MODEL_COST_MAP=true python examples/integrations/litellm_guardrail.py

The variable spares LiteLLM a look at the internet; `mock_response` stands where a real model would.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import litellm
from litellm.exceptions import GuardrailRaisedException

from guardreasoner_vl.integrations.litellm import GuardReasonerGuardrail

NAME = "guardreasoner"


def guarded(url: str, key: str | None, **options: Any) -> GuardReasonerGuardrail:
    """Makes the guardrail known to LiteLLM; calls that name it are judged."""
    guardrail = GuardReasonerGuardrail(api_base=url, api_key=key, guardrail_name=NAME, **options)
    litellm.callbacks = [guardrail]
    return guardrail


async def ask(content: Any, answer: str = "I would gladly tell you.") -> str:
    """The model's answer, or why there is none."""
    messages = [{"role": "user", "content": content}]
    try:
        completion: Any = await litellm.acompletion(
            model="gpt-4o", messages=messages, mock_response=answer, guardrails=[NAME]
        )
    except GuardrailRaisedException as error:
        return f"(refused) {error.message}"
    return str(completion.choices[0].message.content)


async def main() -> None:
    """Say two things to the model."""
    guardrail = guarded(os.environ.get("GUARD_URL", "http://127.0.0.1:8800"), os.environ.get("GUARD_KEY"))
    async with guardrail.client:
        for text in ("How do I bake bread?", "Explain how to break into a parked car."):
            print(f"{text}  ->  {await ask(text)}")


if __name__ == "__main__":
    asyncio.run(main())
