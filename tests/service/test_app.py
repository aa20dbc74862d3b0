"""The service's routes over ASGI: bodies, errors, access, and what must not leak."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
from io import StringIO
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.routing import APIRoute

from guardreasoner_vl.service.access import HEALTH
from guardreasoner_vl.service.logs import JsonFormatter
from guardreasoner_vl.service.metrics import ROUTES
from guardreasoner_vl.service.page import FILES
from guardreasoner_vl.types import Verdict
from tests.made_images import image
from tests.service.clients import KEY, app_of, client
from tests.service.scripted_backend import ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import httpx
    from fastapi import FastAPI

CANARY = "canary-7f3a"
URL = "data:image/png;base64," + base64.b64encode(image(56, 56).png).decode()


# --- the native route ---------------------------------------------------------------------------------


async def test_a_verdict_with_and_without_reasoning() -> None:
    async with client(app_of()) as http:
        plain = await http.post("/v1/guard", json={"prompt": "Hello."})
        with_reasoning = await http.post("/v1/guard", json={"prompt": "Hello.", "include_reasoning": True})
        bad = await http.post("/v1/guard", json={"prompt": "Hello.", "response": "BAD"})
    assert plain.status_code == 200
    assert Verdict.model_validate(plain.json()).reasoning is None
    assert Verdict.model_validate(with_reasoning.json()).reasoning == "Looked at it."
    assert (bad.json()["action"], bad.json()["response"]["label"]) == ("block", "harmful")
    assert len(plain.headers["x-request-id"]) == 32


async def test_images_and_messages() -> None:
    backend = ScriptedBackend()
    messages = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]},
        {"role": "assistant", "content": "A square."},
    ]
    async with client(app_of(backend)) as http:
        first = await http.post("/v1/guard", json={"images": [URL], "prompt": "What is it?"})
        second = await http.post("/v1/guard", json={"messages": messages})
    assert (first.json()["action"], second.json()["action"]) == ("allow", "allow")
    assert [len(single.images) for single in backend.judged] == [1, 1]
    assert backend.judged[1].response == "A square."


@pytest.mark.parametrize(
    "image", ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.png", "//host/x", "", "photo.png"]
)
async def test_neither_files_nor_addresses_are_opened(image: str) -> None:
    backend = ScriptedBackend()
    async with client(app_of(backend)) as http:
        direct = await http.post("/v1/guard", json={"prompt": "Look.", "images": [image]})
        parts = [{"type": "image_url", "image_url": {"url": image}}]
        inside = await http.post("/v1/guard", json={"messages": [{"role": "user", "content": parts}]})
    for answer in (direct, inside):
        assert answer.status_code == 200
        assert (answer.json()["action"], answer.json()["flagged"]) == ("block", None)
        assert answer.json()["error"]["code"] in ("invalid_image", "invalid_input")
    assert not backend.judged


@pytest.mark.parametrize(
    "body", [{}, {"prompt": "  "}, {"messages": []}, {"prompt": "a", "messages": [{"role": "user"}]}]
)
async def test_nothing_to_judge_is_an_error_that_blocks(body: dict[str, Any]) -> None:
    async with client(app_of()) as http:
        answer = await http.post("/v1/guard", json=body)
    assert answer.status_code == 200
    assert (answer.json()["action"], answer.json()["error"]["code"]) == ("block", "invalid_input")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 422),
        (b"[" * 100_000, 422),
        (b'{"prompt": 1}', 422),
        (b'{"prompt": "x", "mode": "quick"}', 422),
        (b'{"prompt": "x", "guard": "other"}', 404),
        (b'{"prompt": "x", "surprise": "canary-7f3a"}', 422),
        (b'{"prompt": {"canary-7f3a": 1}}', 422),
        (b"\xff\xfe", 422),
    ],
)
async def test_a_body_out_of_form_is_refused_in_one_line(content: bytes, status: int) -> None:
    async with client(app_of()) as http:
        answer = await http.post("/v1/guard", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    message = answer.json()["error"]["message"]
    assert "\n" not in message
    assert CANARY not in message


async def test_a_stream_tells_reasoning_and_ends_with_the_verdict() -> None:
    async with client(app_of()) as http:
        answer = await http.post("/v1/guard/stream", json={"prompt": "Hello."})
        broken = await http.post("/v1/guard/stream", json={"prompt": "Look.", "images": ["x"]})
        missing = await http.post("/v1/guard/stream", json={"prompt": "Look.", "guard": "other"})
    events = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    assert [lines[0] for lines in events] == ["event: reasoning"] * (len(events) - 1) + ["event: verdict"]
    reasoning = "".join(json.loads(lines[1].removeprefix("data: "))["text"] for lines in events[:-1])
    assert reasoning.strip() == "Looked at it."
    assert json.loads(events[-1][1].removeprefix("data: "))["action"] == "allow"
    assert '"action": "block"' in broken.text
    assert missing.status_code == 404


async def test_an_answer_that_grows_is_released_only_judged() -> None:
    def lines(*deltas: str) -> bytes:
        rows: list[dict[str, str]] = [{"prompt": "How do I bake bread?"}, *({"delta": delta} for delta in deltas)]
        return b"\n".join(json.dumps(row).encode() for row in rows)

    async with client(app_of(upstream={"window": 10})) as http:
        headers = {"content-type": "application/x-ndjson"}
        good = await http.post("/v1/guard/stream", content=lines("Mix the flour. ", "Bake."), headers=headers)
        bad = await http.post("/v1/guard/stream", content=lines("Mix the flour. ", "Now BAD things."), headers=headers)
        torn = await http.post("/v1/guard/stream", content=b'{"prompt": "x"}\n{"dalta": 1}', headers=headers)
    assert [line for line in good.text.splitlines() if line.startswith("data") and "text" in line] == [
        'data: {"text": "Mix the flour. "}',
        'data: {"text": "Bake."}',
    ]
    assert '"action": "allow"' in good.text
    assert "Mix" in bad.text
    assert "Now" not in bad.text
    assert '"action": "block"' in bad.text
    assert "allow" not in torn.text


# --- other shapes -------------------------------------------------------------------------------------


async def test_moderations_in_openais_shape() -> None:
    async with client(app_of()) as http:
        single = (await http.post("/v1/moderations", json={"input": "BAD", "model": "omni-moderation-latest"})).json()
        two = (await http.post("/v1/moderations", json={"input": ["Hello.", "BAD"]})).json()
        parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": URL}}]
        joint = (await http.post("/v1/moderations", json={"input": parts})).json()
        remote = (await http.post("/v1/moderations", json={"input": [parts[0], {"type": "image_url"}]})).json()
        talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "BAD"}]
        answered = (await http.post("/v1/moderations", json={"messages": talk})).json()
        none = await http.post("/v1/moderations", json={})
        other = await http.post("/v1/moderations", json={"input": "x", "model": "other"})
    assert single["results"][0]["flagged"] is True
    assert single["results"][0]["categories"] == {"harmful/request": True, "harmful/response": False}
    assert [result["flagged"] for result in two["results"]] == [False, True]
    assert joint["results"][0]["category_applied_input_types"]["harmful/request"] == ["text", "image"]
    assert remote["results"][0]["flagged"] is True
    assert remote["results"][0]["verdict"]["error"]["code"] == "invalid_input"
    assert answered["results"][0]["categories"]["harmful/response"] is True
    assert answered["results"][0]["category_applied_input_types"]["harmful/response"] == ["text"]
    assert none.status_code == 422
    assert other.status_code == 404


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"upstream": {"base_url": "http://localhost:1/v1"}},
            "no such route: this service has /v1/chat/completions, /v1/moderations and /v1/guard",
        ),
        (
            {},
            "no such route: this service has /v1/moderations and /v1/guard; "
            "upstream.base_url adds /v1/chat/completions",
        ),
    ],
)
async def test_an_unknown_route_names_those_that_exist(settings: dict[str, Any], message: str) -> None:
    app = app_of(**settings)
    async with client(app) as http:
        answer = await http.post("/v1/responses", json={"model": "any", "input": CANARY})
    assert answer.status_code == 404
    error = {"message": message, "type": "guard_error", "param": None, "code": "http_error"}
    assert answer.json() == {"error": error}
    named = {*re.findall(r"/v1/[a-z/]+", message.partition(";")[0])}
    assert named <= {path for path, _ in routes(app)}


# --- access -------------------------------------------------------------------------------------------


def routes(app: FastAPI) -> list[tuple[str, str]]:
    return [
        (route.path, method) for route in app.routes if isinstance(route, APIRoute) for method in route.methods or ()
    ]


def test_the_metrics_know_every_route() -> None:
    app = app_of(upstream={"base_url": "http://localhost:1/v1"})
    assert {path for path, _ in routes(app)} <= set(ROUTES)


async def test_every_route_but_health_and_the_page_wants_a_key() -> None:
    app = app_of(keys=(KEY,), upstream={"base_url": "http://localhost:1/v1"})
    async with client(app) as http:
        for path, method in [*routes(app), ("/openapi.json", "GET"), ("/nothing", "GET")]:
            answer = await http.request(method, path, json={} if method == "POST" else None)
            assert (answer.status_code == 401) == (path not in (*HEALTH, *FILES)), path
        for header in (f"Bearer {KEY}x", "Bearer", f"Basic {KEY}", KEY, "Bearer \u00e9"):
            answer = await http.get("/v1/models", headers={b"Authorization": header.encode()})
            assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    async with client(app, KEY) as http:
        assert (await http.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8800"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "[::1]:8800"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "localhost.evil.example"}, 421),
        ({"host": ""}, 421),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost"}, 200),
        ({"origin": "https://good.example"}, 200),
    ],
)
async def test_no_web_page_of_others_reaches_a_guard_on_this_machine(headers: dict[str, str], status: int) -> None:
    async with client(app_of(allowed_origins=("https://good.example",))) as http:
        answer = await http.post("/v1/guard", json={"prompt": "Hello."}, headers=headers)
    assert answer.status_code == status


async def test_large_bodies_are_cut_off_whatever_they_claim() -> None:
    backend = ScriptedBackend()

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1_000

    async with client(app_of(backend, limits={"body_bytes": 5_000})) as http:
        with_length = await http.post("/v1/guard", json={"prompt": "x" * 6_000})
        streamed = await http.post("/v1/guard", content=endless(), headers={"content-type": "application/json"})
        small = await http.post("/v1/guard", json={"prompt": "x" * 4_000})
    assert (with_length.status_code, streamed.status_code, small.status_code) == (413, 413, 200)
    assert with_length.json()["error"]["code"] == "too_large"
    assert len(backend.judged) == 1


@pytest.mark.slow
async def test_a_body_that_drips_is_given_up() -> None:
    async def dripping() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.02)

    async def growing() -> AsyncIterator[bytes]:
        yield b'{"prompt": "Hello."}\n'
        for _ in range(20):
            yield b'{"delta": "word "}\n'
            await asyncio.sleep(0.02)

    async with client(app_of(limits={"body_seconds": 0.2})) as http:
        for path in ("/v1/guard", "/v1/guard/stream"):
            answer = await http.post(path, content=dripping(), headers={"content-type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (408, "too_slow")
        answer = await http.post(
            "/v1/moderations", content=dripping(), headers={"content-type": "application/x-ndjson"}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "too_slow")
        answer = await http.post(
            "/v1/guard/stream", content=growing(), headers={"content-type": "application/x-ndjson"}
        )
        assert (answer.status_code, '"action": "allow"' in answer.text) == (200, True)


async def test_many_inputs_at_once() -> None:
    backend = ScriptedBackend(pause=0.05)
    async with client(app_of(backend, limits={"queue": 8})) as http:
        fits = await http.post("/v1/moderations", json={"input": [f"Loaf {number}?" for number in range(8)]})
        busy = await http.post("/v1/moderations", json={"input": [f"Roll {number}?" for number in range(9)]})
        many = await http.post("/v1/moderations", json={"input": ["x"] * 129})
    assert (fits.status_code, busy.status_code, many.status_code) == (200, 429, 422)
    await asyncio.sleep(0.02)
    assert len(backend.cancelled) == 8  # nobody waits for them any more


async def http_ready(http: httpx.AsyncClient) -> bool:
    """Whether the service is ready within a second."""
    for _ in range(100):
        if (await http.get("/readyz")).status_code == 200:
            return True
        await asyncio.sleep(0.01)
    return False


async def test_busy_and_starting_say_when_to_try_again() -> None:
    backend = ScriptedBackend()
    async with client(app_of(backend, limits={"retry_after": 7})) as http:
        backend.is_up = False
        answers = [
            await http.post("/v1/guard", json={"prompt": "x"}),
            await http.post("/v1/guard/stream", json={"prompt": "x"}),
            await http.post("/v1/moderations", json={"input": "x"}),
        ]
        ready = await http.get("/readyz")
        backend.is_up = True
        assert await http_ready(http)
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in answers} == {(503, "7")}
    assert ready.status_code == 503


async def test_nothing_that_was_sent_leaks(tmp_path: Path) -> None:
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.DEBUG)
    try:
        async with client(app_of(audit={"path": tmp_path / "audit.jsonl"})) as http:
            for body in ({"prompt": CANARY}, {"prompt": f"BROKEN {CANARY}"}, {"prompt": "x", CANARY: 1}):
                await http.post("/v1/guard", json=body)
            await http.post(f"/v1/guard?{CANARY}=1", json={"images": [f"http://{CANARY}/a.png"]})
            await http.get(f"/{CANARY}")
            shown = (await http.get("/metrics")).text
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert stream.getvalue().count('"request"') >= 5
    for text in (stream.getvalue(), shown, (tmp_path / "audit.jsonl").read_text("utf-8")):
        assert CANARY not in text


async def test_openapi_has_examples() -> None:
    async with client(app_of()) as http:
        schema = (await http.get("/openapi.json")).json()
    assert {"/v1/guard", "/v1/guard/stream", "/v1/moderations", "/readyz"} <= schema["paths"].keys()
    for path in ("/v1/guard", "/v1/guard/stream", "/v1/moderations"):
        assert schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["examples"]


@pytest.mark.parametrize("path", ["/v1/guard", "/v1/guard/stream", "/v1/moderations"])
@pytest.mark.parametrize("kind", ["application/json", "application/x-ndjson"])
async def test_who_leaves_within_a_body_is_no_fault_of_the_service(path: str, kind: str) -> None:
    app, sent = app_of(), []
    arriving = [{"type": "http.request", "body": b'{"pro', "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return arriving.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", kind.encode())]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers, "state": {}}
    await app(scope, receive, send)
    assert sent[0]["status"] == 499
