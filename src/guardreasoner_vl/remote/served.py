"""A guard that calls a running service (`guardreasoner-vl serve`), which has its own model, policy and batching."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from guardreasoner_vl.baselines.over_http import GuardOverHttp
from guardreasoner_vl.engines.openai.chat import text_part
from guardreasoner_vl.engines.openai.http import HttpClient, HttpError
from guardreasoner_vl.errors import EngineError, GuardError
from guardreasoner_vl.guard import as_exchange
from guardreasoner_vl.images.decode import DEFAULT_LIMITS, checked_images
from guardreasoner_vl.images.encoded import encoded_bytes
from guardreasoner_vl.service.wire import data_url
from guardreasoner_vl.types import CheckedImage, Verdict, failed_verdict

if TYPE_CHECKING:
    from guardreasoner_vl.guard import Item
    from guardreasoner_vl.types import Exchange, ImageSource, Mode, ModelInfo

KEY_VARIABLE = "GUARDREASONER_KEY"


class ServedGuard(GuardOverHttp["Item"]):
    """Sends exchanges to the service at `url`, at most `max_concurrency` at once; reads the key from GUARDREASONER_KEY.

    Raises `EngineError` if the service cannot be used, at once if it cannot be reached. Later failures are `error`
    verdicts. A request is retried if the service is busy, and all but the first if the connection breaks.
    """

    def __init__(self, url: str, mode: Mode, *, max_concurrency: int = 64) -> None:
        key = os.environ.get(KEY_VARIABLE)
        base = f"{url.rstrip('/')}/v1"
        super().__init__(HttpClient(base, key, max_concurrency=max_concurrency, timeout=300.0, retries=5))
        self.mode = mode
        try:
            (first,) = self._loop.run_all([self._send({"prompt": "Hello.", "mode": mode}, reconnect=False)])
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
            messages = messages_with_images(as_exchange(item))
            return await self._send({"messages": messages, "mode": self.mode, "include_reasoning": True})
        except GuardError as error:
            return failed_verdict(error.code, str(error), self.mode, self.model)

    async def _send(self, body: dict[str, Any], *, reconnect: bool = True) -> Verdict:
        try:
            answer = await self._http.post("guard", lambda: body, reconnect=reconnect)
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


def messages_with_images(exchange: Exchange) -> list[dict[str, Any]]:
    """An exchange as chat messages with `data:` URLs. Raises `ImageError` for an image that cannot be read."""
    messages = []
    for turn in (*exchange.history, exchange):
        images = [data for image in turn.images for data in _encoded(image)]
        parts = [{"type": "image_url", "image_url": {"url": data_url(data)}} for data in images]
        parts += [text_part(turn.prompt)] if turn.prompt else []
        if parts:
            messages.append({"role": "user", "content": parts})
        if turn.response:
            messages.append({"role": "assistant", "content": turn.response})
    return messages


def _encoded(image: ImageSource) -> list[bytes]:
    """The bytes of an encoded image, which the service checks; an image in memory as PNG, once for each appearance."""
    if isinstance(image, CheckedImage):
        return [image.png]
    if isinstance(image, (str, bytes, Path)):
        return [encoded_bytes(image, DEFAULT_LIMITS.max_bytes)]
    return [checked.png for checked in checked_images(image)]
