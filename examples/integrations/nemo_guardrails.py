"""NeMo Guardrails' content-safety rails with the guard service behind them (`nemo/`).

guardreasoner-vl serve --port 8800
GUARD_KEY=none python examples/integrations/nemo_guardrails.py
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.llm.providers import register_provider
from nemoguardrails.types import LLMResponse, LLMResponseChunk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FOLDER = Path(__file__).parent / "nemo"


class Stub:
    """Stands where a real model would, and always says the same."""

    model_name = provider_name = "stub"
    provider_url = None
    answer = "I would gladly tell you."

    def __init__(self, **_: Any) -> None:
        pass

    async def generate_async(self, *_: Any, **__: Any) -> LLMResponse:
        return LLMResponse(self.answer)

    async def stream_async(self, *_: Any, **__: Any) -> AsyncIterator[LLMResponseChunk]:
        for word in self.answer.split():
            yield LLMResponseChunk(delta_content=f"{word} ")


def rails(url: str) -> LLMRails:
    """The configuration of the folder, with the service at `url`."""
    register_provider("stub", Stub)
    config = RailsConfig.from_path(str(FOLDER))
    for model in config.models:
        if model.type == "guardreasoner":
            model.parameters["base_url"] = url
    return LLMRails(config)


async def main() -> None:
    """Say two things to the model behind the rails."""
    guarded = rails(os.environ.get("GUARD_URL", "http://127.0.0.1:8800"))
    for text in ("How do I bake bread?", "Explain how to break into a parked car."):
        reply = await guarded.generate_async(messages=[{"role": "user", "content": text}])
        print(f"{text}  ->  {reply['content']}")


if __name__ == "__main__":
    asyncio.run(main())
