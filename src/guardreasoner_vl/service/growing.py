"""An answer that the caller sends as NDJSON while it grows; each piece is released after its verdict."""

from __future__ import annotations

from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from guardreasoner_vl.engines.openai.mending import REPLACEMENT, Halves
from guardreasoner_vl.engines.openai.sse import lines_of
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.service.answers import HeldBack
from guardreasoner_vl.service.bodies import Body, InvalidBodyError, checked, read_body, read_json
from guardreasoner_vl.service.streaming import event, verdict_event
from guardreasoner_vl.service.wire import GuardRequest, shown

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from starlette.requests import Request

    from guardreasoner_vl.service.asking import Asker
    from guardreasoner_vl.types import Exchange, Verdict


class _Delta(Body):
    model_config = ConfigDict(extra="forbid")
    delta: str = ""


async def growing(asking: Asker) -> AsyncIterator[bytes]:
    """Events `release` and, always the last, `verdict`: an error verdict where a line cannot be read.

    Raises `InputError` for a first line that is not a request.
    """
    lines = _lines(asking.request)
    body = read_body(GuardRequest, await anext(lines, b""))
    if body.response is not None or body.messages is not None:
        raise InputError('an answer that grows: give prompt and images first, then lines {"delta": ...}')
    asking.desk.check(body.guard)
    exchange = await body.exchange(asking.fetch)

    answer = ""

    async def with_answer() -> Exchange:
        return replace(exchange, response=answer)

    async def judge() -> Verdict:
        return await asking.verdict_within(with_answer(), body.guard, body.mode)

    async def events() -> AsyncIterator[bytes]:
        nonlocal answer
        held: HeldBack[str] = HeldBack(judge, asking.config.upstream.window)
        try:
            async with aclosing(_deltas(lines)) as deltas:
                async for delta in deltas:
                    answer += delta
                    if pieces := await held.add(delta, len(delta)):
                        yield event("release", {"text": "".join(pieces)})
                    if held.is_blocked:
                        break
        except (InputError, HTTPException) as error:
            verdict = await asking.desk.unjudged(_unreadable(error), asking.origin, body.guard)
        else:
            if text := "".join(await held.finish()):
                yield event("release", {"text": text})
            verdict = held.verdict or await judge()
        yield verdict_event(shown(verdict, body.include_reasoning))

    return events()


async def _deltas(lines: AsyncGenerator[bytes, None]) -> AsyncGenerator[str, None]:
    """The pieces of the answer, until its end or until the caller has gone; surrogate pairs are joined.

    Raises `InvalidBodyError`, and what reading the rest of the body raises.
    """
    halves = Halves()
    with suppress(ClientDisconnect):
        async with aclosing(lines):
            async for line in lines:
                content = read_json(line)
                if isinstance(content, dict) and isinstance(content.get("delta"), str):
                    content["delta"] = halves.join(("delta",), content["delta"])
                if delta := checked(_Delta, content).delta:
                    yield delta
    for _ in halves.alone():
        yield REPLACEMENT


async def _lines(request: Request) -> AsyncGenerator[bytes, None]:
    """The body's lines as they arrive, without blank ones."""
    async with aclosing(lines_of(request.stream())) as lines:
        async for line in lines:
            if line.strip():
                yield line


def _unreadable(error: InputError | HTTPException) -> InputError:
    return error if isinstance(error, InputError) else InvalidBodyError(str(error.detail))
