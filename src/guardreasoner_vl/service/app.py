"""The routes of the service, and their assembly into an ASGI application."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from guardreasoner_vl.errors import GuardError, InputError
from guardreasoner_vl.service.access import NDJSON, Access
from guardreasoner_vl.service.answer_stream import guard_answer_stream
from guardreasoner_vl.service.answers import gather_or_cancel
from guardreasoner_vl.service.audit import AuditLog
from guardreasoner_vl.service.backend import make_backend
from guardreasoner_vl.service.bodies import InvalidBodyError, read_body
from guardreasoner_vl.service.callers import Callers, RefusedError
from guardreasoner_vl.service.context import RequestContext, RequestContextDep, openapi_body, parsed_body
from guardreasoner_vl.service.fetch import ImageFetcher
from guardreasoner_vl.service.litellm_wire import LiteLLMRequest, LiteLLMResponse
from guardreasoner_vl.service.metrics import Metrics
from guardreasoner_vl.service.moderation import ModerationService, UnknownGuardError
from guardreasoner_vl.service.page import FILES
from guardreasoner_vl.service.proxy import add_proxy
from guardreasoner_vl.service.streaming import QueueListener, event_stream, verdict_event
from guardreasoner_vl.service.wire import (
    GuardBody,
    ModerationRequest,
    ModerationResponse,
    blocked_reason,
    error_body,
    moderation_result,
    no_fetch,
    public_verdict,
)
from guardreasoner_vl.types import Target, Verdict
from guardreasoner_vl.version import __version__

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    import httpx
    from starlette.types import Receive, Scope, Send

    from guardreasoner_vl.service.backend import Backend
    from guardreasoner_vl.service.config import ServiceConfig

_log = logging.getLogger(__name__)
_STATUS = {UnknownGuardError: 404, InvalidBodyError: 422, InputError: 400}
_POLICY = "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def create_app(
    config: ServiceConfig,
    backends: Mapping[str, Backend] | None = None,
    upstream: httpx.AsyncBaseTransport | None = None,
) -> FastAPI:
    """Build the service as an ASGI application; tests replace the configured `backends` and `upstream`.

    Raises `InputError` if the audit log cannot be opened. If a model cannot be loaded, the application's start raises
    `ModelError` or `EngineError` and keeps it as `app.state.failure`.
    """
    metrics = Metrics(backends or config.guards)
    guards = backends or {
        name: make_backend(section, config.limits, metrics.engine_restarted) for name, section in config.guards.items()
    }
    callers = Callers(config)
    metrics.callers = callers.names
    audit = AuditLog(config.audit, metrics.audit_failed) if config.audit.path else None
    moderation = ModerationService(guards, config, metrics, audit, callers)
    fetcher = ImageFetcher(config.images) if config.images.hosts else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            for backend in guards.values():
                await backend.start()
            metrics.models({name: backend.model for name, backend in guards.items()})
            moderation.start_probes()
            yield
        except GuardError as error:
            _log.critical("the service cannot start (%s)", str(error))
            app.state.failure = error
            raise
        finally:
            await moderation.close()
            for client in (fetcher, app.state.proxy):
                if client:
                    await client.aclose()

    app = FastAPI(title="GuardReasoner-VL", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.moderation, app.state.config, app.state.metrics, app.state.failure = moderation, config, metrics, None
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
    """Answer errors in OpenAI's format: one line that never quotes the request."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after)}
        return JSONResponse(error_body(error.code, str(error)), error.status, headers)

    @app.exception_handler(GuardError)
    async def failed(_: Request, error: GuardError) -> JSONResponse:
        status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
        return JSONResponse(error_body(error.code, str(error)), status)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        code = getattr(error, "code", "http_error")
        message = _no_such_route(app) if error.status_code == 404 else str(error.detail)
        return JSONResponse(error_body(code, message), error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> JSONResponse:  # noqa: ARG001
        return JSONResponse(error_body("client_gone", "the client has gone"), 499)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body("internal", f"the service failed ({type(error).__name__}): see its log"), 500)


def _no_such_route(app: FastAPI) -> str:
    if app.state.proxy:
        return "no such route: this service has /v1/chat/completions, /v1/moderations and /v1/guard"
    return "no such route: this service has /v1/moderations and /v1/guard; upstream.base_url adds /v1/chat/completions"


def _add_health(app: FastAPI) -> None:
    moderation: ModerationService = app.state.moderation
    metrics: Metrics = app.state.metrics

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """Liveness: the process answers."""
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["health"])
    async def readyz() -> JSONResponse:
        """Readiness: every guard judges, the queue is not full, and no shutdown has begun. Answers at once."""
        state = "leaving" if app.state.leaving else moderation.state()
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics", tags=["health"])
    async def metrics_page() -> Response:
        """Metrics in Prometheus' text format."""
        metrics.engine_up(moderation.ready_guards())
        metrics.engine_load(moderation.engine_loads())
        body, kind = metrics.render()
        return Response(body, media_type=kind)

    @app.get("/v1/models", tags=["guard"])
    async def models() -> dict[str, Any]:
        """The configured guards, the default one first."""
        rows = [
            {"id": name, "object": "model", "owned_by": moderation.backend(name)[1].model.name}
            for name in moderation.guards
        ]
        return {"object": "list", "data": rows}

    for path, (name, kind) in FILES.items():
        _add_file(app, path, name, kind)


def _add_file(app: FastAPI, path: str, name: str, kind: str) -> None:
    content = (files("guardreasoner_vl.service.page") / name).read_bytes()

    @app.get(path, include_in_schema=False, name=name)
    async def page() -> Response:
        return Response(content, media_type=kind, headers={"Content-Security-Policy": _POLICY})


def _add_guard(app: FastAPI) -> None:
    @app.post("/v1/guard", tags=["guard"], openapi_extra=openapi_body(GuardBody))
    async def guard(body: Annotated[GuardBody, Depends(parsed_body(GuardBody))], context: RequestContextDep) -> Verdict:
        """Judge one exchange and return the full verdict; input that cannot be judged is an error verdict."""
        verdict = await context.judge(body.exchange(context.fetch), body.guard, body.mode)
        return public_verdict(verdict, body.include_reasoning)

    @app.post(
        "/v1/guard/stream",
        tags=["guard"],
        response_class=StreamingResponse,
        openapi_extra=openapi_body(GuardBody),
    )
    async def stream(context: RequestContextDep) -> StreamingResponse:
        """Judge one exchange and stream the reasoning; or, with NDJSON, guard an answer while a model writes it.

        JSON: a body of `/v1/guard`; events `reasoning`, `restart`, `verdict`. NDJSON: such a body without response as
        the first line, then lines `{"delta": "..."}`; events `release`, `verdict`.
        """
        if context.request.headers.get("content-type", "").startswith(NDJSON):
            return _DuplexResponse(await guard_answer_stream(context), media_type="text/event-stream")
        return StreamingResponse(await _reasoning_events(context), media_type="text/event-stream")


class _DuplexResponse(StreamingResponse):
    """A streamed response to a request whose body is still arriving: only the route reads that body."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        await self.stream_response(send)


async def _reasoning_events(context: RequestContext) -> AsyncIterator[bytes]:
    body = read_body(GuardBody, await context.request.body())
    context.moderation.check(body.guard)
    listener = QueueListener()
    judging = context.judge_mid_stream(body.exchange(context.fetch), body.guard, body.mode, listener)
    return event_stream(
        listener, judging, lambda verdict: verdict_event(public_verdict(verdict, body.include_reasoning))
    )


def _add_shapes(app: FastAPI) -> None:
    @app.post("/v1/moderations", tags=["compatible"], openapi_extra=openapi_body(ModerationRequest))
    async def moderations(
        body: Annotated[ModerationRequest, Depends(parsed_body(ModerationRequest))], context: RequestContextDep
    ) -> ModerationResponse:
        """OpenAI's moderation: each string by itself, all parts together, or messages with the assistant's answer."""
        verdicts = await gather_or_cancel(
            context.judge(exchange, body.guard, body.mode) for exchange in body.exchanges(context.fetch)
        )
        return ModerationResponse(
            id=f"modr-{context.origin.request_id}",
            model=context.moderation.backend(body.guard)[1].model.name,
            results=[
                moderation_result(verdict, messages, body.include_reasoning)
                for verdict, messages in zip(verdicts, body.conversations, strict=True)
            ],
        )

    @app.post("/beta/litellm_basic_guardrail_api", tags=["compatible"], openapi_extra=openapi_body(LiteLLMRequest))
    async def litellm(
        body: Annotated[LiteLLMRequest, Depends(parsed_body(LiteLLMRequest))], context: RequestContextDep
    ) -> LiteLLMResponse:
        """LiteLLM's generic guardrail API; a body without anything to judge is BLOCKED."""
        target: Target | None = "response" if body.input_type == "response" else None
        verdict = await context.judge(body.exchange(context.fetch), target=target)
        if verdict.action == "allow":
            return LiteLLMResponse(action="NONE")
        return LiteLLMResponse(action="BLOCKED", blocked_reason=blocked_reason(verdict))
