"""Guard an answer that the caller sends as NDJSON while a model writes it; each delta is released after its verdict."""

from __future__ import annotations

from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from guardreasoner_vl.engines.openai.mending import REPLACEMENT, Halves
from guardreasoner_vl.engines.openai.sse import ndjson_lines
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.service.answers import StreamBuffer
from guardreasoner_vl.service.bodies import Body, InvalidBodyError, read_body, read_json, validated_body
from guardreasoner_vl.service.streaming import event, verdict_event
from guardreasoner_vl.service.wire import GuardBody, public_verdict

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from starlette.requests import Request

    from guardreasoner_vl.service.context import RequestContext
    from guardreasoner_vl.types import Exchange, Verdict


class _Delta(Body):
    model_config = ConfigDict(extra="forbid")
    delta: str = ""


async def guard_answer_stream(context: RequestContext) -> AsyncIterator[bytes]:
    """The events `release` and, always the last, `verdict`; a malformed line ends in an error verdict.

    Raises `InputError` if the first line is not a request without an answer.
    """
    lines = _body_lines(context.request)
    body = read_body(GuardBody, await anext(lines, b""))
    if body.response is not None or body.messages is not None:
        raise InputError('an answer that grows: give prompt and images first, then lines {"delta": ...}')
    context.moderation.check(body.guard)
    exchange = await body.exchange(context.fetch)

    answer = ""

    async def with_answer() -> Exchange:
        return replace(exchange, response=answer)

    async def judge() -> Verdict:
        return await context.judge_mid_stream(with_answer(), body.guard, body.mode)

    async def events() -> AsyncIterator[bytes]:
        nonlocal answer
        buffer: StreamBuffer[str] = StreamBuffer(judge, context.config.upstream.window)
        try:
            async with aclosing(_deltas(lines)) as deltas:
                async for delta in deltas:
                    answer += delta
                    if pieces := await buffer.add(delta, len(delta)):
                        yield event("release", {"text": "".join(pieces)})
                    if buffer.is_blocked:
                        break
        except (InputError, HTTPException) as error:
            verdict = await context.moderation.unjudged(_input_error(error), context.origin, body.guard)
        else:
            if text := "".join(await buffer.finish()):
                yield event("release", {"text": text})
            verdict = buffer.verdict or await judge()
        yield verdict_event(public_verdict(verdict, body.include_reasoning))

    return events()


async def _deltas(lines: AsyncGenerator[bytes, None]) -> AsyncGenerator[str, None]:
    """The deltas of the answer until its end or until the caller disconnects; split surrogate pairs are joined.

    Raises `InvalidBodyError`, and whatever reading the rest of the body raises.
    """
    halves = Halves()
    with suppress(ClientDisconnect):
        async with aclosing(lines):
            async for line in lines:
                content = read_json(line)
                if isinstance(content, dict) and isinstance(content.get("delta"), str):
                    content["delta"] = halves.join(("delta",), content["delta"])
                if delta := validated_body(_Delta, content).delta:
                    yield delta
    for _ in halves.unpaired():
        yield REPLACEMENT


async def _body_lines(request: Request) -> AsyncGenerator[bytes, None]:
    """The non-blank lines of the body as they arrive."""
    async with aclosing(ndjson_lines(request.stream())) as lines:
        async for line in lines:
            if line.strip():
                yield line


def _input_error(error: InputError | HTTPException) -> InputError:
    return error if isinstance(error, InputError) else InvalidBodyError(str(error.detail))
