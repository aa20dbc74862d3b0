"""ASGI middleware that guards the chat-completions route of an application.

    request -> judge -> application -> judge its answer -> client

The application receives the judged JSON, rewritten (`service.forwarding`), and only judged fields of its answer are
sent. It may answer with an event stream or JSON, whatever was requested; its own errors pass unchanged. A streamed
answer is released window by window. A blocked answer has OpenAI's form (`service.answers`); a blocked request is status
400 with code `content_filter`.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, TypeAlias

from guardreasoner_vl.engines.openai.chat_stream import UpstreamError
from guardreasoner_vl.remote.client import GuardClient, blocked_reason
from guardreasoner_vl.service.answers import FILTERED, MALFORMED, UNREADABLE, GuardedStream, as_judged
from guardreasoner_vl.service.bodies import InvalidBodyError
from guardreasoner_vl.service.chat_fields import OPERATORS, check_pass_fields, read_chat
from guardreasoner_vl.service.completions import guard_completion
from guardreasoner_vl.service.forwarding import as_forwarded
from guardreasoner_vl.service.wire import error_body, url_of
from guardreasoner_vl.types.media import is_data_url

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence

    from guardreasoner_vl.types import Verdict

    Scope: TypeAlias = MutableMapping[str, Any]
    Message: TypeAlias = MutableMapping[str, Any]
    Receive: TypeAlias = Callable[[], Awaitable[Message]]
    Send: TypeAlias = Callable[[Message], Awaitable[None]]
    Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_UNGUARDED = ("GET", "HEAD", "OPTIONS")
_ENCODED = (b"content-length", b"content-encoding", b"transfer-encoding", b"accept-encoding")


class GuardMiddleware:
    """Guards requests whose path ends in one of `paths`; other requests and websockets pass unchanged.

    `window` is the number of new characters of a streamed answer after which it is judged again; `max_bytes` limits a
    request's body. `pass_fields` lists more fields of a request that pass unjudged (`service.chat_fields`): `NAME`,
    `messages.NAME`, `messages.content.NAME`; other unknown fields are refused. Raises `ValueError` for any other
    name. An image given by its address is refused, because the application would fetch it again and may get another
    image than the guard; `remote_images` passes the addresses of images that the guard service has fetched
    (`images.hosts`) and found harmless.
    """

    def __init__(
        self,
        app: Application,
        guard: GuardClient,
        paths: Sequence[str] = ("/chat/completions",),
        window: int = 400,
        max_bytes: int = 32_000_000,
        pass_fields: Sequence[str] = (),
        remote_images: bool = False,
    ) -> None:
        self._app, self._guard, self._window, self._max_bytes = app, guard, window, max_bytes
        check_pass_fields(pass_fields)
        self._pass_fields, self._remote_images = tuple(pass_fields), remote_images
        self._paths = tuple(path.lower() for path in paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Judge a request to a guarded path and the application's answer to it; pass any other request on."""
        if scope["type"] != "http" or scope["method"] in _UNGUARDED or not self._is_guarded(scope["path"]):
            await self._app(scope, receive, send)
            return
        body = await _receive_body(receive, self._max_bytes)
        if body is None:
            await _refuse(send, 413, "too_large", f"the request has more than {self._max_bytes:,} bytes: send less")
            return
        try:
            chat = read_chat(body, self._pass_fields)
        except InvalidBodyError as error:
            await _refuse(send, 422, error.code, str(error))
            return
        if not self._remote_images and _has_address(chat["messages"]):
            await _refuse(send, 400, "guard_error", "images must be data: URLs: fetch the image and inline it")
            return
        chat["messages"] = await asyncio.to_thread(as_forwarded, chat["messages"])
        messages = [as_judged(message) for message in chat["messages"]]
        verdict = await self._guard.ajudge(messages=messages)
        if verdict.action == "block":
            await _refuse(send, 400, FILTERED if verdict.flagged else "guard_error", blocked_reason(verdict))
            return

        async def judge(answer: dict[str, Any]) -> Verdict:
            return await self._guard.ajudge(messages=[*messages, answer])

        written = json.dumps(chat).encode()
        answer = _Answer(judge, self._window, send)
        await self._app(_rewritten(scope, written), _replayed(written, receive), answer)

    def _is_guarded(self, path: str) -> bool:
        return path.lower().rstrip("/").endswith(self._paths)


def _has_address(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether a judged message holds an image by its address."""
    contents = [message.get("content") for message in messages if message.get("role") not in OPERATORS]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(isinstance(url := url_of(part), str) and not is_data_url(url) for part in parts)


async def _receive_body(receive: Receive, max_bytes: int) -> bytes | None:
    """The request's body; None if it is longer than `max_bytes`."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message["type"] == "http.request" and message.get("more_body", False)
        if len(body) > max_bytes:
            return None
    return body


def _rewritten(scope: Scope, body: bytes) -> Scope:
    """The scope with the new body's length, and without the means to compress the answer or to bypass `send`."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _ENCODED]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())], "extensions": {}}


def _replayed(body: bytes, receive: Receive) -> Receive:
    first = True

    async def replay() -> Message:
        nonlocal first
        if not first:
            return await receive()
        first = False
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class _Answer:
    """Replaces the application's `send`: sends only what was judged."""

    def __init__(
        self, judge: Callable[[dict[str, Any]], Coroutine[Any, Any, Verdict]], window: int, send: Send
    ) -> None:
        self._judge, self._send = judge, send
        self._stream = GuardedStream(judge, window)
        self._start: Message = {}
        self._kind = ""
        self._rest = b""

    async def __call__(self, message: Message) -> None:
        if self._stream.over:
            return
        if message["type"] == "http.response.start":
            self._start, self._kind = message, _response_kind(message)
            if self._kind in ("error", "stream"):
                await self._send(message if self._kind == "error" else _with_headers(message))
        elif message["type"] == "http.response.body":
            body, ended = message.get("body", b""), not message.get("more_body", False)
            if self._kind == "error":
                await self._send(message)
            elif self._kind == "stream":
                await self._streamed(body, ended)
            else:
                self._rest += body
                if ended:
                    await self._complete()

    async def _complete(self) -> None:
        try:
            if self._kind != "json":
                raise ValueError("not JSON")
            completion = await guard_completion(self._rest, self._judge)
        except UpstreamError as error:
            await _refuse(self._send, 502, error.code, str(error))
            return
        except MALFORMED:
            await _refuse(self._send, 502, *UNREADABLE)
            return
        body = json.dumps(completion).encode()
        await self._send(_with_headers(self._start, (b"content-length", str(len(body)).encode())))
        await self._send({"type": "http.response.body", "body": body})

    async def _streamed(self, body: bytes, ended: bool) -> None:
        out = await self._stream.add(body)
        if ended:
            out += await self._stream.finish()
        if out or self._stream.over:
            await self._send({"type": "http.response.body", "body": out, "more_body": not self._stream.over})


def _response_kind(start: Message) -> str:
    """The kind of response: `error` (an error status, without an answer), `stream`, `json` or `unreadable`."""
    headers = {name.lower(): value.lower() for name, value in start.get("headers", ())}
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip()
    if not 200 <= start["status"] < 300:
        return "error"
    if headers.get(b"content-encoding", b"identity") != b"identity":
        return "unreadable"
    return {b"text/event-stream": "stream", b"application/json": "json"}.get(kind, "unreadable")


def _with_headers(start: Message, *more: tuple[bytes, bytes]) -> Message:
    headers = [(name, value) for name, value in start.get("headers", ()) if name.lower() not in _ENCODED]
    return {**start, "headers": [*headers, *more]}


async def _refuse(send: Send, status: int, code: str, message: str) -> None:
    body = json.dumps(error_body(code, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
