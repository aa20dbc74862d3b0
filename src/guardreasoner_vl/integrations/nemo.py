"""NeMo Guardrails' content-safety flows with the guard service as their model.

    models:                                       rails:
      - type: guardreasoner                         input:
        engine: guardreasoner                         flows:
        model: default                                  - content safety check input $model=guardreasoner
        parameters:                                   output:
          base_url: http://127.0.0.1:8800               flows:
                                                          - content safety check output $model=guardreasoner

The prompts of the two checks hand the conversation over and name the output parser `guardreasoner`
(`examples/integrations/nemo`). A `config.py` beside them holds: `from guardreasoner_vl.integrations.nemo import init`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from nemoguardrails.llm.providers import register_provider
from nemoguardrails.types import LLMResponse, LLMResponseChunk

from guardreasoner_vl.integrations.client import DEFAULT_URL, GuardClient, blocked_reason
from guardreasoner_vl.types import Verdict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nemoguardrails import LLMRails
    from nemoguardrails.types import ChatMessage

NAME = "guardreasoner"


def init(app: LLMRails) -> None:
    """What NeMo calls before it loads the models of a configuration."""
    register_provider(NAME, GuardModel)
    app.register_output_parser(parse_verdict, NAME)


def parse_verdict(output: str) -> list[bool | str]:
    """`[True]`, or `[False, reason]`; what is no verdict is not safe."""
    try:
        verdict = Verdict.model_validate_json(output)
    except ValueError:
        return [False, "the guard gave no verdict"]
    return [True] if verdict.action == "allow" else [False, blocked_reason(verdict)]


class GuardModel:
    """What NeMo takes for a model: its answer to a conversation is the verdict about it, as JSON.

    `model` is one of the service's guards; how NeMo would have a model sample is left alone.
    """

    provider_name = NAME

    def __init__(
        self,
        model: str = "default",
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        timeout: float = 120.0,
        on_error: Literal["block", "allow"] = "block",
    ) -> None:
        self.model_name, self.provider_url = model, base_url
        self._guard = GuardClient(base_url, api_key, timeout, guard=model, on_error=on_error)

    async def generate_async(
        self,
        prompt: str | list[ChatMessage],
        *,
        stop: list[str] | None = None,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> LLMResponse:
        """The verdict."""
        if isinstance(prompt, str):
            verdict = await self._guard.ajudge(prompt)
        else:
            verdict = await self._guard.ajudge(messages=[message.to_dict() for message in prompt])
        return LLMResponse(verdict.model_dump_json(), model=self.model_name, finish_reason="stop")

    async def stream_async(
        self, prompt: str | list[ChatMessage], *, stop: list[str] | None = None, **kwargs: Any
    ) -> AsyncIterator[LLMResponseChunk]:
        """The verdict in one piece."""
        whole = await self.generate_async(prompt, stop=stop, **kwargs)
        yield LLMResponseChunk(delta_content=whole.content, model=self.model_name, finish_reason="stop")
