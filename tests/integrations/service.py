"""The real service on a free local port, with a scripted guard.

The guard finds the word BAD and red images harmful and cannot judge BROKEN.
"""

from __future__ import annotations

import base64
import json
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import httpx
from PIL import Image
from pydantic import SecretStr

from guardreasoner_vl.images.decode import decoded_images
from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import KeySection, ServiceConfig, UpstreamSection
from tests.service.running import running
from tests.service.scripted_backend import ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guardreasoner_vl.engines.base import StreamListener
    from guardreasoner_vl.types import Exchange, Mode, Verdict

KEY = "a-key-of-the-tests"
CLOSED = "http://127.0.0.1:9"  # the discard port, where nothing listens


def image(colour: str) -> str:
    """A small image of one colour, as a `data:` URL."""
    encoded = BytesIO()
    Image.new("RGB", (32, 32), colour).save(encoded, "PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


RED, GREEN = image("red"), image("green")


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


EXCHANGES: list[tuple[Any, str, bool]] = [
    ("Hello.", "Gladly.", False),
    ("BAD", "Gladly.", True),
    ("BROKEN", "Gladly.", True),
    ("Hello.", "BAD", True),
    ("Hello.", "BROKEN", True),
    ([image_part(GREEN)], "Gladly.", False),
    ([image_part(RED)], "Gladly.", True),
]
"""What every library has to let through and to block: content, the model's answer, whether it is blocked."""


class Backend(ScriptedBackend):
    """Finds red images harmful, too."""

    async def judge(self, exchange: Exchange, mode: Mode | None, listener: StreamListener | None) -> Verdict:
        if any(_is_red(image) for image in exchange.images):
            exchange = replace(exchange, prompt=f"{exchange.prompt or ''} BAD")
        return await super().judge(exchange, mode, listener)


def _is_red(image: Any) -> bool:
    return decoded_images(image)[0].getpixel((0, 0)) == (255, 0, 0)


@dataclass
class Model:
    """The model behind the service's proxy: answers with `answer`, in pieces of ten characters where streamed.

    `events` are sent in place of a streamed answer.
    """

    answer: str = "Gladly."
    events: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.asked.append(body)
        if body.get("stream"):
            return httpx.Response(200, text="".join(self.events or sse(self.answer)))
        return httpx.Response(200, json=completion(self.answer))


def completion(answer: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def sse(answer: str) -> list[str]:
    """Server-sent events of a streamed answer."""
    pieces = [chunk({"content": answer[at : at + 10]}) for at in range(0, len(answer), 10)]
    return [*(f"data: {json.dumps(one)}\n\n" for one in [*pieces, chunk({}, "stop")]), "data: [DONE]\n\n"]


@dataclass(frozen=True)
class Running:
    """A service that runs; `url` is its root."""

    url: str
    backend: Backend
    model: Model


@contextmanager
def running_service(backend: Any = None, **settings: Any) -> Iterator[Running]:
    """Needs `KEY`; its proxy asks `Running.model`."""
    backend, model = backend or Backend(), Model()
    upstream = UpstreamSection(base_url="http://model.test/v1", window=40)
    config = ServiceConfig(
        keys=(KeySection(name="tests", key=SecretStr(KEY)),), upstream=upstream, log_level="CRITICAL", **settings
    )
    app = create_app(config, {"default": backend}, httpx.MockTransport(model))
    with running(app) as url:
        yield Running(url, backend, model)
