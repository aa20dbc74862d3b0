"""The context of one HTTP request: judge an exchange for a client that may disconnect at any time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends, Request
from starlette.exceptions import HTTPException

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.service.bodies import Body, read_body
from guardreasoner_vl.service.callers import Origin, RefusedError
from guardreasoner_vl.service.moderation import ModerationService

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from guardreasoner_vl.engines.base import StreamListener
    from guardreasoner_vl.service.config import ServiceConfig
    from guardreasoner_vl.service.wire import Fetch
    from guardreasoner_vl.types import Exchange, Mode, Target, Verdict

T = TypeVar("T")
BodyT = TypeVar("BodyT", bound=Body)


@dataclass(frozen=True)
class RequestContext:
    """What a route needs to judge an exchange: the request, the moderation service and the caller."""

    request: Request
    moderation: ModerationService
    config: ServiceConfig
    fetch: Fetch
    origin: Origin

    async def judge(
        self,
        building: Awaitable[Exchange],
        guard: str | None = None,
        mode: Mode | None = None,
        target: Target | None = None,
    ) -> Verdict:
        """Judge the exchange that `building` returns; a client that disconnects cancels it.

        `target` is that of `ModerationService.judge`. Raises `RefusedError` if the exchange is not admitted, and
        `UnknownGuardError`.
        """
        try:
            exchange = await building
        except InputError as error:
            return await self.moderation.unjudged(error, self.origin, guard, target)
        judging = self.moderation.judge(exchange, self.origin, guard=guard, mode=mode, target=target)
        return await while_connected(self.request, judging)

    async def judge_mid_stream(
        self,
        building: Awaitable[Exchange],
        guard: str | None = None,
        mode: Mode | None = None,
        listener: StreamListener | None = None,
        target: Target | None = None,
    ) -> Verdict:
        """Judge while a response is being sent: it is too late for an HTTP error, so a refusal is an error verdict."""
        try:
            exchange = await building
            return await self.moderation.judge(
                exchange, self.origin, guard=guard, mode=mode, listener=listener, target=target
            )
        except (InputError, RefusedError) as error:
            return await self.moderation.unjudged(error, self.origin, guard, target)


async def request_context(request: Request) -> RequestContext:
    """The FastAPI dependency of the routes."""
    state = request.app.state
    return RequestContext(request, state.moderation, state.config, state.fetch, request.state.origin)


def parsed_body(kind: type[BodyT]) -> Callable[[Request], Awaitable[BodyT]]:
    """A FastAPI dependency that parses the request's body as `kind`."""

    async def read(request: Request) -> BodyT:
        return read_body(kind, await request.body())

    return read


def openapi_body(kind: type[Body]) -> dict[str, Any]:
    """The OpenAPI description of a route whose body is a `kind`."""
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


RequestContextDep = Annotated[RequestContext, Depends(request_context)]


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await the work; a client that disconnects cancels it. Raises `HTTPException` 499 in that case."""
    task = asyncio.create_task(work)
    disconnect = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client has gone")
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
