"""A guarded proxy: `/v1/chat/completions` in front of any OpenAI-compatible server.

    request -> judge -> upstream -> judge its answer -> client

A request is forwarded only after its verdict, only its known fields (`service.chat_fields`), and in the form that was
judged (`service.forwarding`). An answer, tool calls included, is sent only after its own verdict, a streamed one window
by window (`service.answers`), and in the form that was requested (JSON or stream), whatever the upstream sends. A
blocked request is status 400, code `content_filter`. In monitor mode everything passes, and the verdicts are in the
metrics and the audit log.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from fastapi.responses import JSONResponse, Response, StreamingResponse

from guardreasoner_vl.engines.openai.chat_stream import UpstreamError, is_event_stream, is_json, reported_error
from guardreasoner_vl.engines.openai.sse import MAX_BYTES, TooLongError
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.service.answers import FILTERED, MALFORMED, UNREADABLE, GuardedStream, as_judged, quotable
from guardreasoner_vl.service.callers import RefusedError
from guardreasoner_vl.service.chat_fields import read_chat
from guardreasoner_vl.service.completions import as_stream, guard_completion, guard_completion_events
from guardreasoner_vl.service.context import RequestContext, RequestContextDep, while_connected
from guardreasoner_vl.service.forwarding import as_forwarded
from guardreasoner_vl.service.wire import blocked_reason, error_body, inline_images
from guardreasoner_vl.types import Exchange, Verdict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

    from guardreasoner_vl.service.answers import Judge
    from guardreasoner_vl.service.config import ServiceConfig

_IDLE_CONNECTIONS = 20
_POOL_SECONDS = 1.0
"""Seconds to wait for a free connection to the upstream."""

_WORD = re.compile(r"[\w.\[\]-]{1,64}")
"""The allowed form of an upstream error's type, param and code, which are forwarded without a verdict."""


def add_proxy(app: FastAPI, transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """Add the route. The caller closes the returned client."""
    config: ServiceConfig = app.state.config
    key = config.upstream.api_key
    # Many idle connections are slow: httpx looks at all pairs of them at each request.
    limits = httpx.Limits(max_connections=config.limits.queue, max_keepalive_connections=_IDLE_CONNECTIONS)
    client = httpx.AsyncClient(
        base_url=(config.upstream.base_url or "").rstrip("/") + "/",
        headers={"Authorization": f"Bearer {key.get_secret_value()}"} if key else {},
        timeout=httpx.Timeout(config.upstream.seconds, pool=_POOL_SECONDS),
        limits=limits,
        follow_redirects=False,
        trust_env=False,
        transport=transport,
    )

    @app.post("/v1/chat/completions", tags=["proxy"])
    async def chat(context: RequestContextDep) -> Response:
        """A guarded chat completion, streamed or not."""
        body = read_chat(await context.request.body(), config.upstream.pass_fields)
        inlined = await inline_images(body["messages"], context.fetch)
        body["messages"] = await asyncio.to_thread(as_forwarded, inlined)
        verdict = await context.judge(_exchange_of(body["messages"]), target="request")
        if verdict.action == "block":
            return JSONResponse(
                error_body(FILTERED if verdict.flagged else "guard_error", blocked_reason(verdict)), 400
            )
        upstream = _Upstream(client, context, body)
        return await while_connected(context.request, upstream.answer())

    return client


@dataclass(frozen=True)
class _Upstream:
    client: httpx.AsyncClient
    context: RequestContext
    body: dict[str, Any]

    async def answer(self) -> Response:
        """Ask the upstream and return its guarded answer in the requested form, JSON or stream.

        Raises `RefusedError` if `limits.queue` chats are at the upstream already.
        """
        request = self.client.build_request("POST", "chat/completions", json=self.body)
        try:
            answer = await self.client.send(request, stream=True)
        except httpx.PoolTimeout:
            wait = self.context.config.limits.retry_after
            raise RefusedError("too many chats wait for the model; try again", "upstream_full", wait) from None
        except httpx.HTTPError as error:
            return _failed(error)
        kind = answer.headers.get("Content-Type", "")
        if answer.is_success and self.body.get("stream") and not is_json(kind):
            return StreamingResponse(self._events(answer), media_type="text/event-stream")
        try:
            content = await _read_whole_answer(answer)
            if not answer.is_success:
                return await _forward_error(answer, content, self._judge)
            return await self._complete(content, is_event_stream(kind))
        except httpx.HTTPError as error:
            return _failed(error)
        except EngineError as error:
            return JSONResponse(error_body(UpstreamError.code, str(error)), 502)
        except MALFORMED:
            return JSONResponse(error_body(*UNREADABLE), 502)
        finally:
            await answer.aclose()

    async def _complete(self, content: bytes, is_stream: bool) -> Response:
        completion = await (guard_completion_events if is_stream else guard_completion)(content, self._judge)
        if self.body.get("stream"):
            return Response(as_stream(completion), media_type="text/event-stream")
        return JSONResponse(completion)

    async def _events(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        """The guarded answer as it is written; nothing is sent before its verdict."""
        stream = GuardedStream(self._judge, self.context.config.upstream.window)
        try:
            async for body in answer.aiter_bytes():
                if out := await stream.add(body):
                    yield out
                if stream.over:
                    break
            if out := await stream.finish():
                yield out
        except httpx.HTTPError as error:
            yield await stream.lost(f"the answer broke off ({type(error).__name__}); ask again")
        finally:
            await answer.aclose()

    async def _judge(self, answer: dict[str, Any]) -> Verdict:
        """Judge the conversation with that answer; if the answer is empty, only the request is judged, again."""
        return await self.context.judge_mid_stream(_exchange_of([*self.body["messages"], answer]), target="response")


async def _exchange_of(messages: list[dict[str, Any]]) -> Exchange:
    return Exchange.from_messages([as_judged(message) for message in messages])


async def _read_whole_answer(answer: httpx.Response) -> bytes:
    """The whole body. Raises `TooLongError`."""
    body = bytearray()
    async for piece in answer.aiter_bytes():
        body += piece
        if len(body) > MAX_BYTES:
            raise TooLongError("the model's answer", MAX_BYTES)
    return bytes(body)


async def _forward_error(answer: httpx.Response, content: bytes, judge: Judge) -> Response:
    """The upstream's own error without the rest of its body, which may quote the model's answer."""
    try:
        body = json.loads(content)
        message, error = reported_error(body), body["error"]
    except MALFORMED:
        message, error = None, None
    text = (
        await quotable(message, judge)
        if message
        else f"the model's server answered HTTP {answer.status_code}: ask again"
    )
    refusal = error_body(UpstreamError.code, text)
    for name in ("type", "param", "code") if isinstance(error, dict) else ():
        if isinstance(error.get(name), int) or (isinstance(error.get(name), str) and _WORD.fullmatch(error[name])):
            refusal["error"][name] = error[name]
    status = answer.status_code if answer.status_code >= 400 else 502
    retry_after = answer.headers.get("Retry-After")
    return JSONResponse(refusal, status, {"Retry-After": retry_after} if retry_after else None)


def _failed(error: Exception) -> JSONResponse:
    message = f"the model did not answer ({type(error).__name__}): check that the server at upstream.base_url runs"
    return JSONResponse(error_body(UpstreamError.code, message), 502)
