"""A guard in front of a model: `/v1/chat/completions` of any OpenAI-compatible server.

    request -> judged -> upstream -> its answer, judged -> client

The request goes on only after its verdict, the answer is released only after its own, tool calls included; a streamed
answer window by window (`streaming.HeldBack`). What a blocked client sees: status 400 and code `content_filter` for a
request, `finish_reason: content_filter` and a refusal for an answer. Where the operator monitors, everything passes,
and the verdicts are in the metrics and the audit log.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from guardreasoner_vl.errors import GuardError
from guardreasoner_vl.service.access import fault
from guardreasoner_vl.service.asking import Asker, Asking, while_connected
from guardreasoner_vl.service.streaming import HeldBack
from guardreasoner_vl.service.wire import blocked_reason, inlined
from guardreasoner_vl.types import Exchange, Verdict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

    from fastapi import FastAPI

    from guardreasoner_vl.service.config import ServiceConfig

FILTERED = "content_filter"
_JUDGED = ("role", "content", "refusal", "tool_calls", "function_call")
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError)


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
        verdict = await asking.verdict(_built(body["messages"]))
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


@dataclass
class _Choice:
    """One answer among `n` that is streamed: its text, held back, and its tool calls, told only at the end."""

    held: HeldBack
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as far as it has come."""
        calls = [call for _, call in sorted(self.calls.items())]
        text = self.held.released + self.held.waiting
        return {"role": "assistant", "content": text or None, **({"tool_calls": calls} if calls else {})}


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
            completion = answer.json()
            completion["choices"] = [await self._released(choice) for choice in completion["choices"]]
        except (httpx.HTTPError, *_MALFORMED) as error:
            return _failed(error)
        return JSONResponse(completion)

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

    async def _released(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The choice, or a refusal in its place. Only what is judged is passed on: no reasoning of the model's own."""
        message = {name: value for name, value in choice["message"].items() if name in _JUDGED}
        verdict = await self._judged(message)
        if verdict.action == "allow":
            return {**choice, "message": message}
        refusal = {"role": "assistant", "content": None, "refusal": blocked_reason(verdict)}
        return {"index": choice.get("index", 0), "message": refusal, "finish_reason": FILTERED}

    async def _events(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        choices: dict[int, _Choice] = {}
        try:
            async for chunk in _chunks(answer):
                for part in chunk.get("choices") or ():
                    choice = choices.setdefault(part.get("index", 0), self._new_choice())
                    if told := await self._told(part, choice):
                        yield _data({**chunk, "choices": [told]})
                if chunk.get("usage") and not chunk.get("choices"):
                    yield _data(chunk)
                blocked = sum(choice.held.is_blocked for choice in choices.values())
                if blocked >= (self.body.get("n") or 1):
                    break  # nothing more can leave
            yield b"data: [DONE]\n\n"
        except (httpx.HTTPError, *_MALFORMED) as error:
            yield _data(fault(UpstreamError.code, f"the answer broke off ({type(error).__name__}); ask again"))
        finally:
            await answer.aclose()

    async def _told(self, part: dict[str, Any], choice: _Choice) -> dict[str, Any] | None:
        """What of a chunk, and of what was held back before it, may leave now."""
        held, delta, ended = choice.held, part.get("delta") or {}, part.get("finish_reason")
        if held.is_blocked:
            return None
        _gather(choice.calls, delta.get("tool_calls") or ())
        text = await held.add((delta.get("content") or "") + (delta.get("refusal") or ""))
        if ended:
            text += await held.finish()
            if choice.calls and not held.is_blocked:
                held.verdict = await self._judged(choice.message)
        if held.verdict and held.is_blocked:
            refusal = {"refusal": blocked_reason(held.verdict)}
            return {"index": part.get("index", 0), "delta": refusal, "finish_reason": FILTERED}
        told: dict[str, Any] = {"role": delta["role"]} if "role" in delta else {}
        if text:
            told["content"] = text
        if ended and choice.calls:
            told["tool_calls"] = [{"index": number, **call} for number, call in sorted(choice.calls.items())]
        if not (told or ended):
            return None
        return {"index": part.get("index", 0), "delta": told, "finish_reason": ended}

    def _new_choice(self) -> _Choice:
        async def judge(text: str) -> Verdict:
            return await self._judged({"role": "assistant", "content": text})

        return _Choice(HeldBack(judge, self.asking.config.upstream.window))

    async def _judged(self, message: dict[str, Any]) -> Verdict:
        """The verdict on the conversation with that answer; on the request alone, again, if the answer is empty."""
        answered = {**message, "role": "assistant"}
        return await self.asking.verdict_within(_built([*self.body["messages"], answered]))


async def _built(messages: list[dict[str, Any]]) -> Exchange:
    return Exchange.from_messages(messages)


def _gather(calls: dict[int, dict[str, Any]], deltas: Iterable[dict[str, Any]]) -> None:
    """Put the pieces of tool calls together: a name and an id come once, arguments bit by bit."""
    for delta in deltas:
        call = calls.setdefault(delta.get("index", 0), {"type": "function", "function": {"name": "", "arguments": ""}})
        if delta.get("id"):
            call["id"] = delta["id"]
        function = delta.get("function") or {}
        for name in ("name", "arguments"):
            call["function"][name] += function.get(name) or ""


async def _chunks(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        kind, _, data = line.partition(":")
        if kind == "data" and data.strip() != "[DONE]":
            yield json.loads(data)


def _data(chunk: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


def _passed_on(answer: httpx.Response) -> Response:
    """The upstream's own refusal, which holds no answer."""
    return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))


def _failed(error: Exception) -> JSONResponse:
    return JSONResponse(fault(UpstreamError.code, f"the model did not answer ({type(error).__name__})"), 502)
