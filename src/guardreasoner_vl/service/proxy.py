"""A guard in front of a model: `/v1/chat/completions` of any OpenAI-compatible server.

    request -> judged -> upstream -> its answer, judged -> client

The request goes on only after its verdict, the answer is released only after its own, tool calls included; a streamed
answer window by window (`service.answers`). A blocked request ends in status 400 and code `content_filter`. Where the
operator monitors, everything passes, and the verdicts are in the metrics and the audit log.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from guardreasoner_vl.errors import GuardError
from guardreasoner_vl.service.answers import FILTERED, MALFORMED, UNREADABLE, GuardedStream, released
from guardreasoner_vl.service.asking import Asker, Asking, while_connected
from guardreasoner_vl.service.wire import blocked_reason, fault, inlined
from guardreasoner_vl.types import Exchange, Verdict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

    from guardreasoner_vl.service.config import ServiceConfig


class UpstreamError(GuardError):
    """The model behind the guard cannot be reached, or its answer cannot be read."""

    code = "upstream"


def add_proxy(app: FastAPI, transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """Add the route; the client is the caller's to close."""
    config: ServiceConfig = app.state.config
    key = config.upstream.api_key
    client = httpx.AsyncClient(
        base_url=(config.upstream.base_url or "").rstrip("/") + "/",
        headers={"Authorization": f"Bearer {key.get_secret_value()}"} if key else {},
        timeout=config.upstream.seconds,
        follow_redirects=False,
        trust_env=False,
        transport=transport,
    )

    @app.post("/v1/chat/completions", tags=["proxy"])
    async def chat(asking: Asking) -> Response:
        """A guarded chat completion, streamed or not."""
        body = await _body(asking.request)
        body["messages"] = await inlined(body["messages"], asking.fetch)
        verdict = await asking.verdict(_built(body["messages"]), side="request")
        if verdict.action == "block":
            return JSONResponse(fault(FILTERED if verdict.flagged else "guard_error", blocked_reason(verdict)), 400)
        upstream = _Upstream(client, asking, body)
        if body.get("stream"):
            return await upstream.streamed()
        return await while_connected(asking.request, upstream.whole())

    return client


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HTTPException(422, "the body is not JSON") from None
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise HTTPException(422, "messages: give a list of chat messages")
    return body


@dataclass(frozen=True)
class _Upstream:
    client: httpx.AsyncClient
    asking: Asker
    body: dict[str, Any]

    async def whole(self) -> Response:
        """The answer, each choice judged."""
        try:
            answer = await self.client.post("chat/completions", json=self.body)
            if answer.status_code != 200:
                return _passed_on(answer)
            return JSONResponse(await released(answer.json(), self._judged))
        except httpx.HTTPError as error:
            return _failed(error)
        except MALFORMED:
            return JSONResponse(fault(*UNREADABLE), 502)

    async def streamed(self) -> Response:
        """The answer as it grows; nothing leaves before it was judged."""
        request = self.client.build_request("POST", "chat/completions", json=self.body)
        try:
            answer = await self.client.send(request, stream=True)
            if answer.status_code != 200:
                await answer.aread()
                await answer.aclose()
                return _passed_on(answer)
        except httpx.HTTPError as error:
            return _failed(error)
        return StreamingResponse(self._events(answer), media_type="text/event-stream")

    async def _events(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        stream = GuardedStream(self._judged, self.asking.config.upstream.window)
        try:
            async for body in answer.aiter_bytes():
                if out := await stream.add(body):
                    yield out
                if stream.over:
                    break
            yield await stream.finish()
        except httpx.HTTPError as error:
            yield stream.broken(UpstreamError.code, f"the answer broke off ({type(error).__name__}); ask again")
        finally:
            await answer.aclose()

    async def _judged(self, answer: dict[str, Any]) -> Verdict:
        """The verdict on the conversation with that answer; on the request alone, again, if the answer is empty."""
        return await self.asking.verdict_within(_built([*self.body["messages"], answer]), side="response")


async def _built(messages: list[dict[str, Any]]) -> Exchange:
    return Exchange.from_messages(messages)


def _passed_on(answer: httpx.Response) -> Response:
    """The upstream's own refusal, which holds no answer."""
    return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))


def _failed(error: Exception) -> JSONResponse:
    return JSONResponse(fault(UpstreamError.code, f"the model did not answer ({type(error).__name__})"), 502)
