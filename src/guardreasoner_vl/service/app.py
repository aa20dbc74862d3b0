"""The service's routes."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from guardreasoner_vl import __version__
from guardreasoner_vl.errors import GuardError, InputError
from guardreasoner_vl.service.access import NDJSON, Access
from guardreasoner_vl.service.answers import all_of
from guardreasoner_vl.service.asking import Asker, Asking, body_of, described
from guardreasoner_vl.service.audit import AuditLog
from guardreasoner_vl.service.backend import backend_of
from guardreasoner_vl.service.bodies import InvalidBodyError, read_body
from guardreasoner_vl.service.callers import Callers, RefusedError
from guardreasoner_vl.service.desk import Desk, UnknownGuardError
from guardreasoner_vl.service.fetch import ImageFetcher
from guardreasoner_vl.service.growing import growing
from guardreasoner_vl.service.litellm_wire import LiteLLMRequest, LiteLLMResponse
from guardreasoner_vl.service.metrics import Metrics
from guardreasoner_vl.service.proxy import add_proxy
from guardreasoner_vl.service.streaming import QueueWatch, told, verdict_event
from guardreasoner_vl.service.wire import (
    GuardRequest,
    ModerationRequest,
    ModerationResponse,
    blocked_reason,
    fault,
    moderation,
    no_fetch,
    shown,
)
from guardreasoner_vl.types import Verdict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    import httpx
    from starlette.types import Receive, Scope, Send

    from guardreasoner_vl.service.backend import Backend
    from guardreasoner_vl.service.config import ServiceConfig, Stage

_log = logging.getLogger(__name__)
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_STATUS = {UnknownGuardError: 404, InvalidBodyError: 422, InputError: 400}
_POLICY = "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def create_app(
    config: ServiceConfig,
    backends: Mapping[str, Backend] | None = None,
    upstream: httpx.AsyncBaseTransport | None = None,
) -> FastAPI:
    """The service as an ASGI application; `backends` and `upstream` stand in for the configured ones in tests.

    Raises `InputError` if the audit log cannot be written. Its start fails with `ModelError` or `EngineError`, also
    kept as `app.state.failure`, if a model cannot be loaded.
    """
    metrics = Metrics(backends or config.guards)
    guards = backends or {
        name: backend_of(section, config.limits.together, metrics.engine_restarted, config.limits.windows)
        for name, section in config.guards.items()
    }
    callers = Callers(config)
    metrics.callers = callers.names
    audit = AuditLog(config.audit, metrics.audit_failed) if config.audit.path else None
    desk = Desk(guards, config, metrics, audit, callers)
    fetcher = ImageFetcher(config.images) if config.images.hosts else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            for backend in guards.values():
                await backend.start()
            desk.begin()
            yield
        except GuardError as error:
            _log.critical("the service cannot start (%s)", str(error))
            app.state.failure = error
            raise
        finally:
            await desk.close()
            for client in (fetcher, app.state.proxy):
                if client:
                    await client.aclose()

    app = FastAPI(title="GuardReasoner-VL", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.desk, app.state.config, app.state.metrics, app.state.failure = desk, config, metrics, None
    app.state.callers, app.state.leaving = callers, False
    app.state.fetch = fetcher.fetch if fetcher else no_fetch
    _add_faults(app)
    _add_health(app)
    _add_guard(app)
    _add_shapes(app)
    app.state.proxy = add_proxy(app, upstream) if config.upstream.base_url else None
    app.add_middleware(Access, config=config, metrics=metrics, callers=callers)
    return app


def _add_faults(app: FastAPI) -> None:
    """Errors in OpenAI's shape, in one line, without what was sent."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after)}
        return JSONResponse(fault(error.code, str(error)), error.status, headers)

    @app.exception_handler(GuardError)
    async def failed(_: Request, error: GuardError) -> JSONResponse:
        status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
        return JSONResponse(fault(error.code, str(error)), status)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        code = getattr(error, "code", "http_error")
        return JSONResponse(fault(code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> JSONResponse:  # noqa: ARG001
        return JSONResponse(fault("client_gone", "the client has gone"), 499)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(fault("internal", f"the service failed ({type(error).__name__})"), 500)


def _add_health(app: FastAPI) -> None:
    desk: Desk = app.state.desk
    metrics: Metrics = app.state.metrics

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """The service is there."""
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["health"])
    async def readyz() -> JSONResponse:
        """Every guard judges, the queue has places, and the service is not about to end; answered at once."""
        state = "leaving" if app.state.leaving else desk.state()
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics", tags=["health"])
    async def metrics_page() -> Response:
        """For Prometheus."""
        body, kind = metrics.render()
        return Response(body, media_type=kind)

    @app.get("/v1/models", tags=["guard"])
    async def models() -> dict[str, Any]:
        """The service's guards, the default one first."""
        rows = [{"id": name, "object": "model", "owned_by": desk.backend(name)[1].model.name} for name in desk.guards]
        return {"object": "list", "data": rows}

    for path, (name, kind) in _FILES.items():
        _add_file(app, path, name, kind)


def _add_file(app: FastAPI, path: str, name: str, kind: str) -> None:
    content = (files("guardreasoner_vl.service") / "page" / name).read_bytes()

    @app.get(path, include_in_schema=False, name=name)
    async def page() -> Response:
        return Response(content, media_type=kind, headers={"Content-Security-Policy": _POLICY})


def _add_guard(app: FastAPI) -> None:
    @app.post("/v1/guard", tags=["guard"], openapi_extra=described(GuardRequest))
    async def guard(body: Annotated[GuardRequest, Depends(body_of(GuardRequest))], asking: Asking) -> Verdict:
        """Judge one exchange: the full verdict. What cannot be judged is an error verdict, whose action says block."""
        verdict = await asking.verdict(body.exchange(asking.fetch), body.guard, body.mode)
        return shown(verdict, body.include_reasoning)

    @app.post(
        "/v1/guard/stream",
        tags=["guard"],
        response_class=StreamingResponse,
        openapi_extra=described(GuardRequest),
    )
    async def stream(asking: Asking) -> StreamingResponse:
        """Judge one exchange and tell the reasoning as it comes; or, as NDJSON, release an answer while it grows.

        JSON: a body of `/v1/guard`; events `reasoning`, `restart`, `verdict`. NDJSON: such a body without response as
        the first line, then lines `{"delta": "..."}`; events `release`, `verdict`.
        """
        if asking.request.headers.get("content-type", "").startswith(NDJSON):
            return _BothWays(await growing(asking), media_type="text/event-stream")
        return StreamingResponse(await _reasoning(asking), media_type="text/event-stream")


class _BothWays(StreamingResponse):
    """A streamed answer to a request that still arrives: the body is the route's to read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        await self.stream_response(send)


async def _reasoning(asking: Asker) -> AsyncIterator[bytes]:
    body = read_body(GuardRequest, await asking.request.body())
    asking.desk.check(body.guard)
    watch = QueueWatch()
    judging = asking.verdict_within(body.exchange(asking.fetch), body.guard, body.mode, watch)
    return told(watch, judging, lambda verdict: verdict_event(shown(verdict, body.include_reasoning)))


def _add_shapes(app: FastAPI) -> None:
    @app.post("/v1/moderations", tags=["compatible"], openapi_extra=described(ModerationRequest))
    async def moderations(
        body: Annotated[ModerationRequest, Depends(body_of(ModerationRequest))], asking: Asking
    ) -> ModerationResponse:
        """OpenAI's moderation: strings one by one, parts as one exchange, or messages with the assistant's answer."""
        verdicts = await all_of(asking.verdict(one, body.guard, body.mode) for one in body.exchanges(asking.fetch))
        return ModerationResponse(
            id=f"modr-{asking.origin.request_id}",
            model=asking.desk.backend(body.guard)[1].model.name,
            results=[
                moderation(verdict, messages, body.include_reasoning)
                for verdict, messages in zip(verdicts, body.conversations, strict=True)
            ],
        )

    @app.post("/beta/litellm_basic_guardrail_api", tags=["compatible"], openapi_extra=described(LiteLLMRequest))
    async def litellm(
        body: Annotated[LiteLLMRequest, Depends(body_of(LiteLLMRequest))], asking: Asking
    ) -> LiteLLMResponse:
        """LiteLLM's generic guardrail; a body without anything to judge is BLOCKED."""
        side: Stage | None = "response" if body.input_type == "response" else None
        verdict = await asking.verdict(body.exchange(asking.fetch), side=side)
        if verdict.action == "allow":
            return LiteLLMResponse(action="NONE")
        return LiteLLMResponse(action="BLOCKED", blocked_reason=blocked_reason(verdict))
