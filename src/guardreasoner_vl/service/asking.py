"""What the routes share: having an exchange judged for a request whose client may leave at any time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends, Request
from starlette.exceptions import HTTPException

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.service.bodies import Body, read_body
from guardreasoner_vl.service.callers import Origin, RefusedError
from guardreasoner_vl.service.desk import Desk

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from guardreasoner_vl.engines.base import Watch
    from guardreasoner_vl.service.config import ServiceConfig, Stage
    from guardreasoner_vl.service.wire import Fetch
    from guardreasoner_vl.types import Exchange, Mode, Verdict

T = TypeVar("T")
Shape = TypeVar("Shape", bound=Body)


@dataclass(frozen=True)
class Asker:
    """What a route needs to have an exchange judged."""

    request: Request
    desk: Desk
    config: ServiceConfig
    fetch: Fetch
    origin: Origin

    async def verdict(
        self,
        building: Awaitable[Exchange],
        guard: str | None = None,
        mode: Mode | None = None,
        side: Stage | None = None,
    ) -> Verdict:
        """The verdict about the exchange that `building` gives, cancelled once the client is gone; `side` as in `Desk`.

        Raises `RefusedError` if the service cannot take it now, `UnknownGuardError`.
        """
        try:
            exchange = await building
        except InputError as error:
            return await self.desk.unjudged(error, self.origin, guard, side)
        judging = self.desk.judge(exchange, self.origin, guard=guard, mode=mode, side=side)
        return await while_connected(self.request, judging)

    async def verdict_within(
        self,
        building: Awaitable[Exchange],
        guard: str | None = None,
        mode: Mode | None = None,
        watch: Watch | None = None,
        side: Stage | None = None,
    ) -> Verdict:
        """The verdict in the middle of an answer, where it is too late to refuse: a refusal is an error verdict."""
        try:
            exchange = await building
            return await self.desk.judge(exchange, self.origin, guard=guard, mode=mode, watch=watch, side=side)
        except (InputError, RefusedError) as error:
            return await self.desk.unjudged(error, self.origin, guard, side)


async def asker(request: Request) -> Asker:
    """For routes that depend on it."""
    state = request.app.state
    return Asker(request, state.desk, state.config, state.fetch, request.state.origin)


def body_of(kind: type[Shape]) -> Callable[[Request], Awaitable[Shape]]:
    """A dependency of routes that reads a body of that shape."""

    async def read(request: Request) -> Shape:
        return read_body(kind, await request.body())

    return read


def described(kind: type[Body]) -> dict[str, Any]:
    """The OpenAPI description of a route whose body has that shape."""
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


Asking = Annotated[Asker, Depends(asker)]


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; a client that leaves cancels it."""
    task = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client has gone")
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
