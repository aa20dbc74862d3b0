"""Request and response are enforced independently, on every route."""

from __future__ import annotations

import itertools
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.protocol import Reason
from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import ServiceConfig, UpstreamSection
from guardreasoner_vl.service.enforcement import enforced_verdict, present_targets
from guardreasoner_vl.types import Exchange, ModelInfo, failed_verdict
from tests.judging.test_judge import BENIGN, PHRASE, CountingEngine, finds_phrase, judged
from tests.service.clients import client as client_of
from tests.service.enforcement_table import ENFORCE, MONITOR, TABLE, USES, exchange_of, messages_of, settings_of
from tests.service.sided_backend import SidedBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from guardreasoner_vl.engines.base import EngineRequest
    from guardreasoner_vl.types import Target

    Ask = Callable[[httpx.AsyncClient, str, bool], Awaitable[str]]

MODEL = "http://model.test/v1"


class Model:
    """The model behind the proxy; returns `answer` and counts its calls."""

    def __init__(self, answer: str = "Fine.") -> None:
        self.answer, self.asked = answer, 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        message = {"role": "assistant", "content": self.answer}
        if not json.loads(request.content).get("stream"):
            return httpx.Response(200, json={"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        chunks = [{"index": 0, "delta": message}, {"index": 0, "delta": {}, "finish_reason": "stop"}]
        lines = [f"data: {json.dumps({'choices': [chunk]})}\n\n" for chunk in chunks]
        kind = {"content-type": "text/event-stream"}
        return httpx.Response(200, text="".join([*lines, "data: [DONE]\n\n"]), headers=kind)


@asynccontextmanager
async def client(model: Model, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    config = ServiceConfig(upstream=UpstreamSection(base_url=MODEL, window=10), **settings)
    app = create_app(config, {"default": SidedBackend()}, httpx.MockTransport(model))
    async with client_of(app) as http:
        yield http


async def by_fields(http: httpx.AsyncClient, wrong: str, prefill: bool) -> str:
    return str((await http.post("/v1/guard", json=exchange_of(wrong, prefill))).json()["action"])


async def by_messages(http: httpx.AsyncClient, wrong: str, prefill: bool) -> str:
    return str((await http.post("/v1/guard", json={"messages": messages_of(wrong, prefill)})).json()["action"])


async def by_watched(http: httpx.AsyncClient, wrong: str, prefill: bool) -> str:
    return last_action(await http.post("/v1/guard/stream", json=exchange_of(wrong, prefill)))


async def by_growing(http: httpx.AsyncClient, wrong: str, prefill: bool) -> str:
    said = exchange_of(wrong, prefill)
    rows = [{"prompt": said["prompt"]}, *([{"delta": said["response"]}] if prefill else [])]
    body = b"\n".join(json.dumps(row).encode() for row in rows)
    return last_action(
        await http.post("/v1/guard/stream", content=body, headers={"content-type": "application/x-ndjson"})
    )


async def by_moderation(http: httpx.AsyncClient, wrong: str, prefill: bool) -> str:
    body = {"messages": messages_of(wrong, prefill)} if prefill else {"input": exchange_of(wrong, False)["prompt"]}
    result = (await http.post("/v1/moderations", json=body)).json()["results"][0]
    return "block" if result["flagged"] else "allow"


async def by_moderation_of_messages(http: httpx.AsyncClient, wrong: str, prefill: bool) -> str:
    result = (await http.post("/v1/moderations", json={"messages": messages_of(wrong, prefill)})).json()["results"][0]
    return "block" if result["flagged"] else "allow"


async def by_litellm(http: httpx.AsyncClient, wrong: str, prefill: bool) -> str:
    body = {"input_type": "request", "structured_messages": messages_of(wrong, prefill)}
    action = (await http.post("/beta/litellm_basic_guardrail_api", json=body)).json()["action"]
    return {"NONE": "allow", "BLOCKED": "block"}[action]


def last_action(answer: httpx.Response) -> str:
    last = answer.text.strip().split("\n\n")[-1]
    assert last.startswith("event: verdict")
    return str(json.loads(last.split("data: ")[1])["action"])


WAYS: list[Ask] = [
    by_fields,
    by_messages,
    by_watched,
    by_growing,
    by_moderation,
    by_moderation_of_messages,
    by_litellm,
]


@pytest.mark.parametrize("ask", WAYS)
@pytest.mark.parametrize(("request_use", "response_use"), USES)
async def test_each_side_is_enforced_for_itself(ask: Ask, request_use: str, response_use: str) -> None:
    rows = [row[2:] for row in TABLE if row[:2] == (request_use, response_use)]
    async with client(Model(), **settings_of(request_use, response_use)) as http:
        actions = [(prefill, wrong, await ask(http, wrong, prefill)) for prefill, wrong, _ in rows]
    assert actions == rows


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("request_use", "response_use"), USES)
async def test_the_proxy_asks_the_model_only_about_what_passed(
    stream: bool, request_use: str, response_use: str
) -> None:
    """Before the model is asked, an error counts for the request alone, whatever the prefill."""
    asked = {
        ("request", False): request_use == MONITOR,
        ("request", True): request_use == MONITOR,
        ("response", True): response_use == MONITOR,
        ("error", False): request_use == MONITOR,
        ("error", True): request_use == MONITOR,
    }
    for (wrong, prefill), passes in asked.items():
        model = Model()
        async with client(model, **settings_of(request_use, response_use)) as http:
            answer = await http.post(
                "/v1/chat/completions",
                json={"model": "m", "messages": messages_of(wrong, prefill), "stream": stream},
            )
        assert (model.asked, answer.status_code) == ((1, 200) if passes else (0, 400)), (wrong, prefill)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("request_use", "response_use"), USES)
@pytest.mark.parametrize("answer", ["A BAD answer.", "A BROKEN answer."])
async def test_the_proxy_releases_an_answer_by_the_response_alone(
    stream: bool, request_use: str, response_use: str, answer: str
) -> None:
    async with client(Model(answer), **settings_of(request_use, response_use)) as http:
        response = await http.post(
            "/v1/chat/completions",
            json={"model": "m", "messages": [{"role": "user", "content": "Hello."}], "stream": stream},
        )
    assert response.status_code == 200
    assert (answer in response.text) == (response_use == MONITOR)
    assert ("content_filter" in response.text) == (response_use == ENFORCE)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_to_a_harmful_request_that_is_monitored_is_released(stream: bool) -> None:
    async with client(Model(), **settings_of(MONITOR, ENFORCE)) as http:
        response = await http.post(
            "/v1/chat/completions", json={"model": "m", "messages": messages_of("request", False), "stream": stream}
        )
    assert (response.status_code, "Fine." in response.text) == (200, True)


@pytest.mark.parametrize("ask", WAYS)
async def test_an_error_takes_the_stricter_choice_of_the_sides_that_are_there(ask: Ask) -> None:
    for request_choice, response_choice in itertools.product(("block", "allow"), repeat=2):
        settings = {"request": {"on_error": request_choice}, "response": {"on_error": response_choice}}
        async with client(Model(), **settings) as http:
            alone, answered = [await ask(http, "error", prefill) for prefill in (False, True)]
        assert alone == request_choice
        assert answered == ("allow" if (request_choice, response_choice) == ("allow", "allow") else "block")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("on_error", ["block", "allow"])
@pytest.mark.parametrize("broken", TARGETS)
def test_a_window_without_a_verdict_beside_a_harmful_side(broken: Target, on_error: str, use: tuple[str, str]) -> None:
    """The target whose window failed is enforced by its `on_error`, the harmful one by its mode."""

    def breaks(request: EngineRequest) -> str:
        if "kites" in request.messages[1].text:
            raise EngineError("the engine is out of order; try again")
        return finds_phrase(request)

    texts = (BENIGN * 30 + "kites", PHRASE)
    prompt, response = texts if broken == "request" else texts[::-1]
    exchange = Exchange(prompt, response=response)
    verdict = judged(exchange, CountingEngine(breaks, limit=2048), long_input="windows")
    modes = dict(zip(TARGETS, use, strict=True))
    config = ServiceConfig.model_validate({name: {"mode": modes[name], "on_error": on_error} for name in TARGETS})
    harmful: Target = "response" if broken == "request" else "request"
    blocks = modes[harmful] == ENFORCE or (modes[broken] == ENFORCE and on_error == "block")
    assert enforced_verdict(verdict, present_targets(exchange), config).action == ("block" if blocks else "allow")


GUARDS = ["engine", "engine_gone", "engine_down", "auth", "queue_full"]
AUTHORS = [
    *("invalid_input", "invalid_image", "input_too_long", "unreadable", "unsupported", "deadline", "timeout"),
    *("cancelled", "no_score", "caller_busy", "rate_limited", "unauthorised", "error", "refused"),
    *(reason.value for reason in Reason if reason is not Reason.ENGINE),
]


@pytest.mark.parametrize("mode", [ENFORCE, MONITOR])
@pytest.mark.parametrize(("code", "passes"), [*((code, True) for code in GUARDS), *((code, False) for code in AUTHORS)])
def test_only_a_fault_of_the_guard_fails_open(code: str, passes: bool, mode: str) -> None:
    failed = failed_verdict(code, "no verdict", "slow", ModelInfo(name="m"))
    for on_error in ("allow", "block"):
        sides = {"mode": mode, "on_error": on_error}
        config = ServiceConfig.model_validate({"request": sides, "response": sides})
        action = "allow" if mode == MONITOR or (passes and on_error == "allow") else "block"
        assert enforced_verdict(failed, TARGETS, config).action == action
