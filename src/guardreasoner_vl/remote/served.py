"""A guard that calls a running service (`guardreasoner-vl serve`), which has its own model, policy and batching."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from guardreasoner_vl.baselines.over_http import GuardOverHttp
from guardreasoner_vl.engines.openai.chat import image_part, text_part
from guardreasoner_vl.engines.openai.http import HttpClient, HttpError
from guardreasoner_vl.errors import EngineError, GuardError
from guardreasoner_vl.guard import as_exchange
from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.types import CheckedImage, Verdict, failed_verdict

if TYPE_CHECKING:
    from guardreasoner_vl.guard import Item
    from guardreasoner_vl.types import Exchange, Mode, ModelInfo, Turn

KEY_VARIABLE = "GUARDREASONER_KEY"


class ServedGuard(GuardOverHttp["Item"]):
    """Sends exchanges to the service at `url`, at most `max_concurrency` at once; reads the key from GUARDREASONER_KEY.

    Raises `EngineError` if the service cannot be used. Later failures are `error` verdicts; if the service is busy, the
    request is retried.
    """

    def __init__(
        self, url: str, mode: Mode, *, max_concurrency: int = 64, timeout: float = 300.0, retries: int = 5
    ) -> None:
        key = os.environ.get(KEY_VARIABLE)
        base = f"{url.rstrip('/')}/v1"
        super().__init__(HttpClient(base, key, max_concurrency=max_concurrency, timeout=timeout, retries=retries))
        self.mode = mode
        try:
            (first,) = self._loop.run_all([self._send({"prompt": "Hello.", "mode": mode})])
        except BaseException:
            self.close()
            raise
        self.model: ModelInfo = first.model

    @property
    def settings(self) -> dict[str, Any]:
        """Empty: only the service knows its settings."""
        return {}

    async def _verdict(self, item: Item) -> Verdict:
        try:
            exchange, _ = checked_exchange(as_exchange(item))
            return await self._send({"messages": messages_of(exchange), "mode": self.mode, "include_reasoning": True})
        except GuardError as error:
            return failed_verdict(error.code, str(error), self.mode, self.model)

    async def _send(self, body: dict[str, Any]) -> Verdict:
        try:
            answer = await self._http.post("guard", lambda: body)
        except HttpError as error:
            if error.status in (401, 403):
                raise EngineError(f"{self._http.server} refused the key: set {KEY_VARIABLE}") from error
            raise
        try:
            return Verdict.model_validate_json(answer)
        except ValidationError as error:
            raise EngineError(
                "the answer is not a verdict: check that the URL is a guardreasoner-vl service"
            ) from error


def messages_of(exchange: Exchange) -> list[dict[str, Any]]:
    """An exchange with checked images, as chat messages with `data:` URLs."""
    messages = []
    for turn in (*exchange.history, exchange):
        parts = [*_images(turn), *([text_part(turn.prompt)] if turn.prompt else [])]
        if parts:
            messages.append({"role": "user", "content": parts})
        if turn.response:
            messages.append({"role": "assistant", "content": turn.response})
    return messages


def _images(turn: Turn) -> list[dict[str, Any]]:
    return [image_part(image) for image in turn.images if isinstance(image, CheckedImage)]
