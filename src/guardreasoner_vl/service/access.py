"""Who may ask, and how much: checked before a route sees the request (`serving.md`, section 4).

    request id -> Host -> Origin -> key, which names the caller -> size -> time to arrive

Health probes, which ask by address, skip the checks of Host, Origin and key; the page's own files need no key. Without
keys the service listens on this machine alone, and a web page that the user has open must not reach it: its Origin is
not the service's, and a name that was rebound to this machine is not an allowed Host.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from guardreasoner_vl.service.callers import ANONYMOUS, Callers, Origin
from guardreasoner_vl.service.metrics import METHODS
from guardreasoner_vl.service.turnstile import Turnstile
from guardreasoner_vl.service.wire import fault

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from guardreasoner_vl.service.config import ServiceConfig
    from guardreasoner_vl.service.metrics import Metrics

_log = logging.getLogger(__name__)
HEALTH = ("/healthz", "/readyz")
PAGE = ("/", "/page.css", "/page.js")
REQUEST_ID = b"x-request-id"
TRACE = b"traceparent"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_TRACE = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
NDJSON = "application/x-ndjson"
GROWING = "/v1/guard/stream"
"""The route that takes an answer while it grows."""


class RefusedRequestError(HTTPException):
    """What the client is told instead of an answer; an `HTTPException`, so that FastAPI lets it through."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, message)
        self.code = code


class Access:
    """The outermost layer of the service: refuses, numbers, counts and logs requests; content is never looked at."""

    def __init__(self, app: ASGIApp, config: ServiceConfig, metrics: Metrics, callers: Callers) -> None:
        self._app, self._config, self._metrics, self._callers = app, config, metrics, callers
        self._turnstile = Turnstile()
        self._held = 0
        self._hosts = {host.lower() for host in (*config.allowed_hosts, *_own_names(config.host))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _Headers(scope)
        origin = _origin(headers)
        body = _Body()
        started, status, answered = time.perf_counter(), 500, False

        async def numbered(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], True
                message = {**message, "headers": [*message["headers"], *_headers(origin)]}
            await send(message)

        try:
            origin = replace(origin, caller=self._checked(scope["path"], headers))
            scope.setdefault("state", {})["origin"] = origin
            if scope["path"] not in HEALTH:
                await self._turnstile.enter()
            await self._app(scope, self._bounded(scope, headers, receive, body, origin.caller), numbered)
        except RefusedRequestError as error:
            if answered:
                raise
            await _answer(error, numbered)
        finally:
            self._held -= body.taken
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, scope["method"], status, seconds)
            _log.info(
                "request",
                extra={
                    "request_id": origin.request_id,
                    "traceparent": origin.traceparent,
                    "caller": origin.caller,
                    "route": route,
                    "method": scope["method"] if scope["method"] in METHODS else "OTHER",
                    "status": status,
                    "seconds": round(seconds, 4),
                },
            )

    def _checked(self, path: str, headers: _Headers) -> str:
        """The caller. Raises `RefusedRequestError`."""
        if headers.length > self._config.limits.body_bytes:
            raise self._too_large()
        if path in HEALTH:
            return ANONYMOUS
        self._check_host(headers)
        self._check_origin(headers)
        return ANONYMOUS if path in PAGE else self._caller(headers)

    def _check_host(self, headers: _Headers) -> None:
        """Only where no key protects the service: there a rebound name would be enough to use it."""
        if self._callers.needs_key and not self._config.allowed_hosts:
            return
        if _host_name(headers.get(b"host")) not in self._hosts:
            raise self._refused(421, "bad_host", "this Host is not served: add it to allowed_hosts")

    def _check_origin(self, headers: _Headers) -> None:
        origin = headers.get(b"origin")
        if not origin or origin in self._config.allowed_origins:
            return
        if _place(origin) != headers.get(b"host").lower():
            raise self._refused(403, "bad_origin", "web pages of other origins may not ask: see allowed_origins")

    def _caller(self, headers: _Headers) -> str:
        if not self._callers.needs_key:
            return ANONYMOUS
        scheme, _, given = headers.raw(b"authorization").partition(b" ")
        caller = self._callers.named(given.strip() if scheme.lower() == b"bearer" else b"")
        if caller is None:
            raise self._refused(401, "unauthorised", "give a key: Authorization: Bearer KEY")
        return caller

    def _bounded(self, scope: Scope, headers: _Headers, receive: Receive, body: _Body, caller: str) -> Receive:
        """`receive` that counts bytes and seconds, whatever the headers say."""
        limits = self._config.limits
        until = time.monotonic() + limits.body_seconds
        grows = scope["path"] == GROWING and headers.get(b"content-type").startswith(NDJSON)
        whole = False

        async def bounded() -> Message:
            nonlocal whole
            if whole:
                return await receive()  # only the client's leaving can come
            # An answer that grows comes as slowly as its model writes it, but it comes.
            left = limits.body_seconds if grows else until - time.monotonic()
            try:
                async with asyncio.timeout(left):
                    message = await receive()
            except TimeoutError:
                told = "the request took too long to arrive: send it again"
                raise self._refused(408, "too_slow", told, caller) from None
            size = len(message.get("body", b""))
            body.taken += size
            self._held += size
            whole = not message.get("more_body", False)
            if body.taken > limits.body_bytes:
                raise self._too_large(caller)
            if self._held > limits.all_bodies_bytes:
                raise self._refused(503, "bodies_full", "too many large requests are under way: try again", caller)
            return message

        return bounded

    def _too_large(self, caller: str = ANONYMOUS) -> RefusedRequestError:
        most = self._config.limits.body_bytes
        return self._refused(413, "too_large", f"the request has more than {most:,} bytes: send less at once", caller)

    def _refused(self, status: int, code: str, message: str, caller: str = ANONYMOUS) -> RefusedRequestError:
        """The refusal, counted here: FastAPI answers one raised while it reads the body, and no layer above sees it."""
        self._metrics.refused(code, caller)
        return RefusedRequestError(status, code, message)


@dataclass
class _Body:
    """How many bytes of a request's body have come."""

    taken: int = 0


class _Headers:
    """The first of each header; names in lower case, as ASGI has them."""

    def __init__(self, scope: Scope) -> None:
        self._values: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            self._values.setdefault(name, value)

    def raw(self, name: bytes) -> bytes:
        return self._values.get(name, b"")

    def get(self, name: bytes) -> str:
        return self.raw(name).decode("latin-1")

    @property
    def length(self) -> int:
        value = self.raw(b"content-length")
        return int(value) if value.isdigit() else 0


def _origin(headers: _Headers) -> Origin:
    """The caller's ids if they have a form that is safe to repeat, else a new request id and no trace."""
    request_id, trace = headers.raw(REQUEST_ID), headers.raw(TRACE)
    return Origin(
        request_id.decode("ascii") if _REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex,
        traceparent=trace.decode("ascii") if _TRACE.fullmatch(trace) else None,
    )


def _headers(origin: Origin) -> list[tuple[bytes, bytes]]:
    traced = [(TRACE, origin.traceparent.encode())] if origin.traceparent else []
    return [
        (REQUEST_ID, origin.request_id.encode()),
        *traced,
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", b"no-store"),
    ]


def _own_names(host: str) -> set[str]:
    names = {host, "localhost", "127.0.0.1", "::1"}
    return names - {"0.0.0.0", "::"}


def _place(origin: str) -> str:
    """Host and port of an Origin header; "" if it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # a bracket that is not closed
        return ""


def _host_name(value: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        name = urlsplit(f"//{value}").hostname or ""
        return str(ipaddress.ip_address(name)) if ":" in name else name.lower()
    except ValueError:
        return ""


async def _answer(error: RefusedRequestError, send: Send) -> None:
    body = json.dumps(fault(error.code, error.detail)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status_code == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": error.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
