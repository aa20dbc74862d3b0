"""Another guard behind an OpenAI-compatible server, with the interface of `Guard`: exchanges in, verdicts out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.baselines.base import Adapter, read_guard_answer
from guardreasoner_vl.baselines.chat_guards import LlamaGuard, LlavaGuard, Qwen3Guard
from guardreasoner_vl.baselines.openai_moderation import OpenAIModeration
from guardreasoner_vl.baselines.over_http import GuardOverHttp
from guardreasoner_vl.baselines.plain_guards import GuardReasoner, WildGuard
from guardreasoner_vl.baselines.verdicts import verdict_of, worse
from guardreasoner_vl.engines.openai.chat import NEUTRAL
from guardreasoner_vl.engines.openai.http import HttpClient, HttpError, openai_key
from guardreasoner_vl.errors import GuardError, InputError
from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.types import ModelInfo, Usage, failed_verdict

if TYPE_CHECKING:
    from guardreasoner_vl.baselines.base import AdapterRequest
    from guardreasoner_vl.types import Exchange, Judgement, Mode, Target, Verdict

ADAPTERS: dict[str, Adapter] = {
    "llama-guard-3-8b": LlamaGuard(parts=False),
    "llama-guard-3-1b": LlamaGuard(),
    "llama-guard-3-vision": LlamaGuard(most_images=1),
    "llama-guard-4": LlamaGuard(most_images=5),
    "wildguard": WildGuard(),
    "qwen3guard": Qwen3Guard(),
    "qwen3guard-loose": Qwen3Guard(controversial="unharmful"),
    "llavaguard": LlavaGuard(),
    "guardreasoner": GuardReasoner(),
    "openai-moderation": OpenAIModeration(),
}
"""Adapters by name. Any other chat model can be evaluated zero-shot with `--engine openai` and this project's
instruction."""

_REFUSED = (400, 422)

LOCAL = "shieldgemma-2"
"""The guard that runs in this process (`baselines.shieldgemma`), because its own processor builds its prompts."""


class BaselineGuard(GuardOverHttp["Exchange"]):
    """Judges with another guard through its adapter. Unsupported exchanges and malformed answers get `error` verdicts.

    The server's key is read from OPENAI_API_KEY. Raises `InputError` for an unknown guard.
    """

    def __init__(self, guard: str, base_url: str, model: str, *, max_concurrency: int = 32) -> None:
        if guard not in ADAPTERS:
            raise InputError(f"unknown guard {guard!r:.40}: use {', '.join([*ADAPTERS, LOCAL])}")
        self._guard, self._adapter = guard, ADAPTERS[guard]
        self._model = model
        self._accepts_neutral = True
        super().__init__(HttpClient(base_url, openai_key(None), max_concurrency=max_concurrency))

    @property
    def model(self) -> ModelInfo:
        """The model's name at the server; its revision is unknown."""
        return ModelInfo(name=self._model)

    @property
    def mode(self) -> Mode:
        """`slow` for guards that reason, else `fast`."""
        return "slow" if self._adapter.reasons else "fast"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that affect verdicts, besides the model and the mode."""
        return {"adapter": self._guard}

    async def _verdict(self, item: Exchange) -> Verdict:
        started = time.perf_counter()
        judgements: dict[Target, Judgement] = {}
        tokens = 0
        try:
            for request in self._adapter.build_requests(checked_exchange(item)[0]):
                answer = read_guard_answer(request.path, await self._send(request))
                tokens += answer.completion_tokens
                for target, judgement in self._adapter.read(request, answer).items():
                    judgements[target] = worse(judgements.get(target), judgement)
        except GuardError as error:
            return failed_verdict(error.code, str(error), self.mode, self.model, _used(tokens, started))
        return verdict_of(judgements, self.mode, self.model, _used(tokens, started))

    async def _send(self, request: AdapterRequest) -> bytes:
        """Send the request; returns the answer's body. Retries without `NEUTRAL` if the server refuses that."""
        if self._accepts_neutral:
            try:
                return await self._http.post(request.path, lambda: {"model": self._model, **request.payload()})
            except HttpError as error:
                if error.status not in _REFUSED or request.path == "moderations":
                    raise
        body = await self._http.post(
            request.path, lambda: {"model": self._model, **_without_neutral(request.payload())}
        )
        self._accepts_neutral = False
        return body


def _without_neutral(payload: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in payload.items() if name not in NEUTRAL}


def _used(tokens: int, started: float) -> Usage:
    return Usage(completion_tokens=tokens, seconds=time.perf_counter() - started)
