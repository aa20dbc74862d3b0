"""Access control before a route runs: who may send requests, and how large.

    request id -> Host -> Origin -> key, which names the caller -> body size -> time to arrive

Health probes address the service by IP and skip the checks of Host, Origin and key; the page's own files need no key.
Without keys the service listens on loopback only, and web pages open in the user's browser must not reach it: their
Origin differs from the service's, and a DNS name rebound to this machine is not an allowed Host.
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

from guardreasoner_vl.service.admission import AdmissionGate
from guardreasoner_vl.service.callers import ANONYMOUS, Callers, Origin
from guardreasoner_vl.service.metrics import METHODS
from guardreasoner_vl.service.page import FILES
from guardreasoner_vl.service.wire import error_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from guardreasoner_vl.service.config import ServiceConfig
    from guardreasoner_vl.service.metrics import Metrics

_log = logging.getLogger(__name__)
HEALTH = ("/healthz", "/readyz")
_QUIET = frozenset((*HEALTH, *FILES))
"""Paths whose requests are logged at DEBUG: they are requested often and judge nothing."""

REQUEST_ID = b"x-request-id"
TRACE = b"traceparent"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_TRACE = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
NDJSON = "application/x-ndjson"
ANSWER_STREAM = "/v1/guard/stream"
"""The route that accepts an answer while a model writes it."""


class RefusedRequestError(HTTPException):
    """A refusal with its HTTP status; an `HTTPException`, because FastAPI replaces other errors of reading a body."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, message)
        self.code = code


class Access:
    """The outermost ASGI layer: refuses, numbers, counts and logs requests; it never inspects content."""

    def __init__(self, app: ASGIApp, config: ServiceConfig, metrics: Metrics, callers: Callers) -> None:
        self._app, self._config, self._metrics, self._callers = app, config, metrics, callers
        self._gate = AdmissionGate()
        self._body_bytes = 0
        self._hosts = {host.lower() for host in (*config.allowed_hosts, *_own_names(config.host))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request, pass it on or answer the refusal, and count and log the result."""
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
                await self._gate.enter()
            await self._app(scope, self._bounded(scope, headers, receive, body, origin.caller), numbered)
        except RefusedRequestError as error:
            if answered:
                raise
            await _send_refusal(error, numbered)
        finally:
            self._body_bytes -= body.received
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, scope["method"], status, seconds)
            _log.log(
                logging.DEBUG if scope["path"] in _QUIET else logging.INFO,
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
        """Check the headers and return the caller's name. Raises `RefusedRequestError`."""
        if headers.length > self._config.limits.body_bytes:
            raise self._too_large()
        if path in HEALTH:
            return ANONYMOUS
        self._check_host(headers)
        self._check_origin(headers)
        return ANONYMOUS if path in FILES else self._caller(headers)

    def _check_host(self, headers: _Headers) -> None:
        """Refuse an unknown Host header; with keys only if `allowed_hosts` is set.

        Without keys, a DNS name rebound to this machine would suffice to use the service.
        """
        if self._callers.needs_key and not self._config.allowed_hosts:
            return
        if _host_name(headers.get(b"host")) not in self._hosts:
            raise self._refused(421, "bad_host", "this Host is not served: add it to allowed_hosts")

    def _check_origin(self, headers: _Headers) -> None:
        origin = headers.get(b"origin")
        if not origin or origin in self._config.allowed_origins:
            return
        if _authority(origin) != headers.get(b"host").lower():
            raise self._refused(403, "bad_origin", "pages of this origin may not call the service: see allowed_origins")

    def _caller(self, headers: _Headers) -> str:
        if not self._callers.needs_key:
            return ANONYMOUS
        scheme, _, key = headers.raw(b"authorization").partition(b" ")
        caller = self._callers.named(key.strip() if scheme.lower() == b"bearer" else b"")
        if caller is None:
            raise self._refused(401, "unauthorised", "give a key: Authorization: Bearer KEY")
        return caller

    def _bounded(self, scope: Scope, headers: _Headers, receive: Receive, body: _Body, caller: str) -> Receive:
        """Wrap `receive` to bound the body's bytes and seconds, independently of its headers."""
        limits = self._config.limits
        until = time.monotonic() + limits.body_seconds
        is_streamed = scope["path"] == ANSWER_STREAM and headers.get(b"content-type").startswith(NDJSON)
        whole = False

        async def bounded() -> Message:
            nonlocal whole
            if whole:
                return await receive()  # after the body only the disconnect message can follow
            # A streamed answer arrives as slowly as its model writes it, so its bound is per message.
            seconds = limits.body_seconds if is_streamed else until - time.monotonic()
            try:
                async with asyncio.timeout(seconds):
                    message = await receive()
            except TimeoutError:
                message_text = "the request took too long to arrive: send it again"
                raise self._refused(408, "too_slow", message_text, caller) from None
            size = len(message.get("body", b""))
            body.received += size
            self._body_bytes += size
            whole = not message.get("more_body", False)
            if body.received > limits.body_bytes:
                raise self._too_large(caller)
            if self._body_bytes > limits.all_bodies_bytes:
                raise self._refused(503, "bodies_full", "too many large requests are in flight: try again", caller)
            return message

        return bounded

    def _too_large(self, caller: str = ANONYMOUS) -> RefusedRequestError:
        most = self._config.limits.body_bytes
        return self._refused(413, "too_large", f"the request has more than {most:,} bytes: send less at once", caller)

    def _refused(self, status: int, code: str, message: str, caller: str = ANONYMOUS) -> RefusedRequestError:
        """Count a refusal and return it; `__call__` does not see one that FastAPI answers while it reads a body."""
        self._metrics.refused(code, caller)
        return RefusedRequestError(status, code, message)


@dataclass
class _Body:
    """The number of bytes received of a request's body."""

    received: int = 0


class _Headers:
    """The first value of each header; names are lower case, as in ASGI."""

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
    """The caller's ids if they are safe to repeat, else a new request id and no trace."""
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


def _authority(origin: str) -> str:
    """Host and port of an Origin header; empty if it is malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # an unclosed bracket
        return ""


def _host_name(value: str) -> str:
    """The name in a Host header, without port and brackets; empty if it is malformed."""
    try:
        name = urlsplit(f"//{value}").hostname or ""
        return str(ipaddress.ip_address(name)) if ":" in name else name.lower()
    except ValueError:
        return ""


async def _send_refusal(error: RefusedRequestError, send: Send) -> None:
    body = json.dumps(error_body(error.code, error.detail)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status_code == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": error.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
