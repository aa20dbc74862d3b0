"""The guarded proxy in front of a mock transport that plays the model, and a client of it."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx

from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import ServiceConfig
from tests.service.clients import client as client_of
from tests.service.scripted_backend import ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

HELLO = [{"role": "user", "content": "Hello."}]
CALL = {"id": "c1", "type": "function", "function": {"name": "bake", "arguments": '{"what": "BAD"}'}}


class Model:
    """Answers with `message`, or with `chunks` of a stream; records the requests."""

    def __init__(self, message: dict[str, Any] | None = None, chunks: list[dict[str, Any]] | None = None) -> None:
        self.message = message or {"role": "assistant", "content": "Fine."}
        self.chunks = chunks or []
        self.asked: list[httpx.Request] = []
        self.fault: Callable[[], httpx.Response] | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if self.fault:
            return self.fault()
        if json.loads(request.content).get("stream"):
            lines = [f"data: {json.dumps({'id': 'x', 'choices': [chunk]})}\n\n" for chunk in self.chunks]
            usage = 'data: {"id": "x", "choices": [], "usage": {"total_tokens": 3}}\n\n'
            return httpx.Response(200, text="".join([*lines, usage, "data: [DONE]\n\n"]))
        choice = {"index": 0, "message": self.message, "finish_reason": "stop", "logprobs": {"content": []}}
        return httpx.Response(200, json={"id": "x", "object": "chat.completion", "choices": [choice]})


def delta(finish: str | None = None, **values: Any) -> dict[str, Any]:
    return {"index": 0, "delta": values, "finish_reason": finish, "logprobs": {"content": [{"token": "leak"}]}}


@asynccontextmanager
async def client(
    model: Model, backend: ScriptedBackend | None = None, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    upstream: Any = {"base_url": "http://model.test/v1", "api_key": "upstream-key", "window": 10}
    config = ServiceConfig(upstream=upstream, **settings)
    app = create_app(config, {"default": backend or ScriptedBackend()}, httpx.MockTransport(model))
    async with client_of(app) as http:
        yield http


async def asked(http: httpx.AsyncClient, messages: Any = HELLO, **values: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={"model": "m", "messages": messages, **values})


def chunks_in(answer: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream; checks that it ends in `[DONE]` if and only if it has no error."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    assert ("[DONE]" in lines) == (not any("error" in chunk for chunk in chunks))
    return chunks


def content(answer: httpx.Response) -> str:
    deltas = [choice["delta"] for chunk in chunks_in(answer) for choice in chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)
