"""The ASGI middleware obeys what the service enforces, for each row of the table, whole and streamed."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from guardreasoner_vl.integrations.asgi import GuardMiddleware
from guardreasoner_vl.remote.client import GuardClient
from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import ServiceConfig
from tests.integrations.service import completion, sse
from tests.service.enforcement_table import ENFORCE, TABLE, USES, messages_of, settings_of
from tests.service.running import running
from tests.service.sided_backend import SidedBackend

if TYPE_CHECKING:
    from collections.abc import Iterator


class Application:
    """Answers with `answer`, streamed if the request asks for it; counts how often it was asked."""

    def __init__(self, answer: str = "Fine.") -> None:
        self.answer, self.asked = answer, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        streamed = json.loads((await receive())["body"]).get("stream")
        kind = b"text/event-stream" if streamed else b"application/json"
        body = "".join(sse(self.answer)) if streamed else json.dumps(completion(self.answer))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": body.encode()})


@contextmanager
def guard_service(request_use: str, response_use: str) -> Iterator[str]:
    config = ServiceConfig(log_level="CRITICAL", **settings_of(request_use, response_use))
    with running(create_app(config, {"default": SidedBackend()})) as url:
        yield url


async def through(url: str, application: Application, messages: list[dict[str, Any]], stream: bool) -> httpx.Response:
    async with GuardClient(url) as guard:
        transport = httpx.ASGITransport(GuardMiddleware(application, guard, window=10))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.post("/v1/chat/completions", json={"messages": messages, "stream": stream})


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("request_use", "response_use"), USES)
async def test_the_application_is_asked_only_about_what_passes(
    stream: bool, request_use: str, response_use: str
) -> None:
    with guard_service(request_use, response_use) as url:
        for prefill, wrong, action in [row[2:] for row in TABLE if row[:2] == (request_use, response_use)]:
            application = Application()
            answer = await through(url, application, messages_of(wrong, prefill), stream)
            assert (application.asked, answer.status_code) == ((1, 200) if action == "allow" else (0, 400))


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("request_use", "response_use"), USES)
async def test_a_harmful_answer_is_released_only_where_responses_are_monitored(
    stream: bool, request_use: str, response_use: str
) -> None:
    with guard_service(request_use, response_use) as url:
        answer = await through(url, Application("A BAD answer."), [{"role": "user", "content": "Hello."}], stream)
    assert answer.status_code == 200
    assert ("content_filter" in answer.text, "BAD" in answer.text) == (
        (True, False) if response_use == ENFORCE else (False, True)
    )
