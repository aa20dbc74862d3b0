"""A guard in front of a model: `/v1/chat/completions` of any OpenAI-compatible server.

    request -> judged -> upstream -> its answer, judged -> client

The request goes on only after its verdict and only in known fields (`service.passing`). The answer, tool calls too, is
sent only after its own verdict, a streamed answer window by window (`service.answers`), and in the form that was asked
for, whatever the upstream sends. A blocked request ends in status 400 and code `content_filter`. In monitor mode
everything passes, and the verdicts are in the metrics and the audit log.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from fastapi.responses import JSONResponse, Response, StreamingResponse

from guardreasoner_vl.engines.openai.chat_stream import UpstreamError, is_event_stream, is_json, reported_error
from guardreasoner_vl.engines.openai.sse import MOST_BYTES, TooLongError
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.service.answers import FILTERED, MALFORMED, UNREADABLE, GuardedStream, as_judged, quotable
from guardreasoner_vl.service.asking import Asker, Asking, while_connected
from guardreasoner_vl.service.passing import read_chat
from guardreasoner_vl.service.whole_answers import as_stream, released, released_events
from guardreasoner_vl.service.wire import blocked_reason, fault, inlined
from guardreasoner_vl.types import Exchange, Verdict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

    from guardreasoner_vl.service.answers import Judge
    from guardreasoner_vl.service.config import ServiceConfig

_WORD = re.compile(r"[\w.\[\]-]{1,64}")
"""What an error's type, param and code may be: they are passed on unjudged."""


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
        body = read_chat(await asking.request.body(), config.upstream.pass_fields)
        body["messages"] = await inlined(body["messages"], asking.fetch)
        verdict = await asking.verdict(_built(body["messages"]), side="request")
        if verdict.action == "block":
            return JSONResponse(fault(FILTERED if verdict.flagged else "guard_error", blocked_reason(verdict)), 400)
        upstream = _Upstream(client, asking, body)
        return await while_connected(asking.request, upstream.answer())

    return client


@dataclass(frozen=True)
class _Upstream:
    client: httpx.AsyncClient
    asking: Asker
    body: dict[str, Any]

    async def answer(self) -> Response:
        """The answer as it was asked for, whole or streamed, in whatever form it comes."""
        request = self.client.build_request("POST", "chat/completions", json=self.body)
        try:
            answer = await self.client.send(request, stream=True)
        except httpx.HTTPError as error:
            return _failed(error)
        kind = answer.headers.get("Content-Type", "")
        if answer.is_success and self.body.get("stream") and not is_json(kind):
            return StreamingResponse(self._events(answer), media_type="text/event-stream")
        try:
            content = await _whole(answer)
            if not answer.is_success:
                return await _passed_on(answer, content, self._judged)
            return await self._complete(content, is_event_stream(kind))
        except httpx.HTTPError as error:
            return _failed(error)
        except EngineError as error:
            return JSONResponse(fault(UpstreamError.code, str(error)), 502)
        except MALFORMED:
            return JSONResponse(fault(*UNREADABLE), 502)
        finally:
            await answer.aclose()

    async def _complete(self, content: bytes, is_stream: bool) -> Response:
        completion = await (released_events if is_stream else released)(content, self._judged)
        if self.body.get("stream"):
            return Response(as_stream(completion), media_type="text/event-stream")
        return JSONResponse(completion)

    async def _events(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        """The answer as it grows; nothing is sent before it was judged."""
        stream = GuardedStream(self._judged, self.asking.config.upstream.window)
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

    async def _judged(self, answer: dict[str, Any]) -> Verdict:
        """The verdict on the conversation with that answer; on the request alone, again, if the answer is empty."""
        return await self.asking.verdict_within(_built([*self.body["messages"], answer]), side="response")


async def _built(messages: list[dict[str, Any]]) -> Exchange:
    return Exchange.from_messages([as_judged(message) for message in messages])


async def _whole(answer: httpx.Response) -> bytes:
    """The body. Raises `TooLongError`."""
    body = bytearray()
    async for piece in answer.aiter_bytes():
        body += piece
        if len(body) > MOST_BYTES:
            raise TooLongError("the model's answer", MOST_BYTES)
    return bytes(body)


async def _passed_on(answer: httpx.Response, content: bytes, judge: Judge) -> Response:
    """The upstream's own error, without the rest of its body, which may quote the model's answer."""
    try:
        body = json.loads(content)
        message, error = reported_error(body), body["error"]
    except MALFORMED:
        message, error = None, None
    told = (
        await quotable(message, judge)
        if message
        else f"the model's server answered HTTP {answer.status_code}: ask again"
    )
    refusal = fault(UpstreamError.code, told)
    for name in ("type", "param", "code") if isinstance(error, dict) else ():
        if isinstance(error.get(name), int) or (isinstance(error.get(name), str) and _WORD.fullmatch(error[name])):
            refusal["error"][name] = error[name]
    status = answer.status_code if answer.status_code >= 400 else 502
    wait = answer.headers.get("Retry-After")
    return JSONResponse(refusal, status, {"Retry-After": wait} if wait else None)


def _failed(error: Exception) -> JSONResponse:
    return JSONResponse(fault(UpstreamError.code, f"the model did not answer ({type(error).__name__})"), 502)
