"""The guardrail in LiteLLM's real proxy: every route that is judged, whole and streamed, with a scripted server behind.

What a client of the proxy sends and gets goes through the proxy's own application, its routes and translations.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_asyncio
import yaml

from tests.integrations.examples import FOLDER
from tests.integrations.litellm_proxy import MASTER_KEY, Server, Upstream, shown_text, write_config
from tests.integrations.service import GREEN, KEY, RED, Running
from tests.local_server import LocalServer

pytest.importorskip("litellm", reason="litellm is not installed")

import litellm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.filterwarnings("ignore")]  # LiteLLM's own
UPSTREAM = Upstream()
LONG = "Fine words. " * 10
CIPHER = "c" * 90


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(running: Running, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    from litellm.proxy import proxy_server

    guardrail = copy.deepcopy(yaml.safe_load((FOLDER / "litellm_config.yaml").read_text())["guardrails"][0])
    guardrail["litellm_params"].update(api_base=running.url, api_key=KEY, window=40)
    with LocalServer(type("Scripted", (Server,), {"upstream": UPSTREAM})) as server:
        config = write_config(tmp_path_factory.mktemp("litellm"), guardrail, server.url)
        await proxy_server.initialize(config=str(config))
        transport = httpx.ASGITransport(proxy_server.app, raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {MASTER_KEY}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers=headers, timeout=30
        ) as http:
            yield http
        for callback in litellm.callbacks:
            if hasattr(callback, "client"):
                await callback.client.aclose()
    litellm.callbacks = []


@pytest.fixture(autouse=True)
def nothing_said(service: Running) -> None:
    UPSTREAM.asked.clear()
    UPSTREAM.blocks, UPSTREAM.items = [text_block("Gladly.")], [text_item("Gladly.")]
    UPSTREAM.message = "Gladly."


def text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def text_item(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {"type": "message", "id": "m1", "role": "assistant", "status": "completed", "content": [part]}


def says(text: str) -> None:
    UPSTREAM.blocks, UPSTREAM.items, UPSTREAM.message = [text_block(text)], [text_item(text)], text


def body_of(route: str, said: Any, model: str | None = None) -> dict[str, Any]:
    if route == "/v1/messages":
        messages = said if isinstance(said, list) else [{"role": "user", "content": said}]
        return {"model": model or "claude", "max_tokens": 99, "messages": messages}
    if route == "/v1/responses":
        return {"model": model or "gpt", "input": said}
    if route == "/v1/completions":
        return {"model": model or "gpt", "prompt": said}
    return {"model": model or "gpt", "messages": [{"role": "user", "content": said}]}


ROUTES = [
    ("/v1/messages", "claude"),
    ("/v1/messages", "gpt"),
    ("/v1/responses", "gpt"),
    ("/v1/responses", "claude"),
    ("/v1/chat/completions", "gpt"),
    ("/v1/chat/completions", "claude"),
]
"""Each with the model whose own API it is, and with one that LiteLLM translates for."""


def is_refused(answer: httpx.Response) -> bool:
    return "the guard" in answer.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("route", "model"), ROUTES)
@pytest.mark.parametrize(
    ("said", "answer", "asked", "blocked"),
    [
        ("Hello.", "Gladly.", 1, False),
        ("BAD", "Gladly.", 0, True),
        ("BROKEN", "Gladly.", 0, True),
        ("Hello.", "BAD", 1, True),
        ("Hello.", "BROKEN", 1, True),
    ],
)
async def test_request_and_answer_are_judged(
    proxy: httpx.AsyncClient, route: str, model: str, stream: bool, said: str, answer: str, asked: int, blocked: bool
) -> None:
    says(answer)
    got = await proxy.post(route, json={**body_of(route, said, model), "stream": stream})
    assert (is_refused(got), len(UPSTREAM.asked)) == (blocked, asked), got.text
    assert (answer in shown_text(got)) != blocked


@pytest.mark.parametrize("stream", [False, True])
async def test_text_completions_are_judged(proxy: httpx.AsyncClient, stream: bool) -> None:
    for said, asked in (("BAD", 0), (["Hello.", "BAD"], 0)):
        got = await proxy.post("/v1/completions", json={**body_of("/v1/completions", said), "stream": stream})
        assert (is_refused(got), len(UPSTREAM.asked)) == (True, asked)


@pytest.mark.parametrize(("route", "model"), ROUTES)
async def test_a_stream_is_held_back_window_by_window(proxy: httpx.AsyncClient, route: str, model: str) -> None:
    says(LONG)
    got = await proxy.post(route, json={**body_of(route, "Hello.", model), "stream": True})
    assert shown_text(got) == LONG
    for ending in ("BAD", "BROKEN"):
        says(LONG + ending)
        got = await proxy.post(route, json={**body_of(route, "Hello.", model), "stream": True})
        assert is_refused(got)
        assert (LONG + ending).startswith(shown_text(got) if got.status_code == 200 else "")
        assert ending not in got.text


HARMFUL_BLOCKS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "BAD", "signature": CIPHER},
    {"type": "redacted_thinking", "data": "BAD"},
    {"type": "tool_use", "id": "t1", "name": "look", "input": {"what": "BAD"}},
    {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "BAD"}},
    {
        "type": "web_search_tool_result",
        "tool_use_id": "s1",
        "content": [{"type": "web_search_result", "url": "u", "title": "BAD", "encrypted_content": CIPHER}],
    },
    {
        "type": "code_execution_tool_result",
        "tool_use_id": "s1",
        "content": {"type": "code_execution_result", "stdout": "BAD", "stderr": "", "return_code": 0, "content": []},
    },
    {"type": "mcp_tool_use", "id": "m1", "name": "look", "server_name": "s", "input": {"what": "BAD"}},
    {"type": "mcp_tool_result", "tool_use_id": "m1", "is_error": False, "content": [text_block("BAD")]},
    {"type": "mcp_tool_result", "tool_use_id": "m1", "content": [{"type": "image", "source": {"data": RED}}]},
    {"type": "container_upload", "file_id": "f1"},
    {"type": "something_new", "deep": [{"down": "BAD"}]},
]
HARMLESS_BLOCKS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "First this.", "signature": CIPHER},
    {"type": "redacted_thinking", "data": CIPHER},
    {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "bread"}},
    {
        "type": "web_search_tool_result",
        "tool_use_id": "s1",
        "content": [{"type": "web_search_result", "url": "u", "title": "Bread", "encrypted_content": CIPHER}],
    },
    {"type": "tool_use", "id": "t1", "name": "look", "input": {"what": "it"}},
    text_block("Gladly."),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("block", HARMFUL_BLOCKS, ids=lambda block: block["type"])
async def test_every_block_of_a_message_is_judged_or_refused(
    proxy: httpx.AsyncClient, block: dict[str, Any], stream: bool
) -> None:
    UPSTREAM.blocks = [text_block("Let me look."), block]
    got = await proxy.post("/v1/messages", json={**body_of("/v1/messages", "Hello."), "stream": stream})
    assert is_refused(got)
    assert "BAD" not in got.text


@pytest.mark.parametrize("stream", [False, True])
async def test_harmless_blocks_leave_as_they_are(proxy: httpx.AsyncClient, stream: bool) -> None:
    UPSTREAM.blocks = HARMLESS_BLOCKS
    got = await proxy.post("/v1/messages", json={**body_of("/v1/messages", "Hello."), "stream": stream})
    assert not is_refused(got)
    for block in HARMLESS_BLOCKS:
        assert f'"{block["type"]}"' in got.text
    if not stream:
        assert got.json()["content"] == HARMLESS_BLOCKS


HARMFUL_ITEMS: list[dict[str, Any]] = [
    {"type": "reasoning", "id": "r1", "summary": [{"type": "summary_text", "text": "BAD"}]},
    {"type": "reasoning", "id": "r1", "summary": [], "encrypted_content": "BAD"},
    {"type": "function_call", "id": "f1", "call_id": "c1", "name": "look", "arguments": '{"what": "BAD"}'},
    {"type": "custom_tool_call", "id": "f1", "call_id": "c1", "name": "look", "input": "BAD"},
    {"type": "web_search_call", "id": "w1", "status": "completed", "action": {"type": "search", "query": "BAD"}},
    {"type": "file_search_call", "id": "f1", "status": "completed", "queries": ["x"], "results": [{"text": "BAD"}]},
    {
        "type": "code_interpreter_call",
        "id": "i1",
        "status": "completed",
        "container_id": "c1",
        "code": "BAD",
        "outputs": [],
    },
    {
        "type": "code_interpreter_call",
        "id": "i1",
        "status": "completed",
        "container_id": "c1",
        "code": "1",
        "outputs": [{"type": "logs", "logs": "BAD"}],
    },
    {"type": "image_generation_call", "id": "g1", "status": "completed", "result": RED.partition(",")[2]},
    {"type": "mcp_call", "id": "m1", "server_label": "s", "name": "look", "arguments": "{}", "output": "BAD"},
    {"type": "something_new", "id": "x1", "deep": [{"down": "BAD"}]},
]
HARMLESS_ITEMS: list[dict[str, Any]] = [
    {
        "type": "reasoning",
        "id": "r1",
        "summary": [{"type": "summary_text", "text": "First."}],
        "encrypted_content": CIPHER,
    },
    {"type": "web_search_call", "id": "w1", "status": "completed", "action": {"type": "search", "query": "bread"}},
    {"type": "image_generation_call", "id": "g1", "status": "completed", "result": GREEN.partition(",")[2]},
    text_item("Gladly."),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("item", HARMFUL_ITEMS, ids=lambda item: item["type"])
async def test_every_item_of_a_response_is_judged_or_refused(
    proxy: httpx.AsyncClient, item: dict[str, Any], stream: bool
) -> None:
    UPSTREAM.items = [text_item("Let me look."), item]
    got = await proxy.post("/v1/responses", json={**body_of("/v1/responses", "Hello."), "stream": stream})
    assert is_refused(got)
    assert "BAD" not in got.text


@pytest.mark.parametrize("stream", [False, True])
async def test_harmless_items_leave_as_they_are(proxy: httpx.AsyncClient, stream: bool) -> None:
    UPSTREAM.items = HARMLESS_ITEMS
    got = await proxy.post("/v1/responses", json={**body_of("/v1/responses", "Hello."), "stream": stream})
    assert not is_refused(got)
    for item in HARMLESS_ITEMS:
        assert f'"{item["type"]}"' in got.text


def image_block(url: str) -> dict[str, Any]:
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]},
    }


ASKED: list[tuple[str, Any, bool]] = [
    ("/v1/messages", [text_block("What is it?"), image_block(GREEN)], False),
    ("/v1/messages", [image_block(RED)], True),
    (
        "/v1/messages",
        [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "BAD"}}],
        True,
    ),
    ("/v1/messages", [{"type": "document", "source": {"type": "base64", "data": "AAAA"}}], True),
    ("/v1/messages", [{"type": "tool_result", "tool_use_id": "t1", "content": "BAD"}], True),
    ("/v1/messages", [{"type": "tool_result", "tool_use_id": "t1", "content": [image_block(RED)]}], True),
    ("/v1/messages", [{"type": "tool_result", "tool_use_id": "t1", "content": "BAD"}, text_block("Go on.")], True),
    ("/v1/responses", [{"role": "user", "content": [{"type": "input_image", "image_url": GREEN}]}], False),
    ("/v1/responses", [{"role": "user", "content": [{"type": "input_image", "image_url": RED}]}], True),
    ("/v1/responses", [{"role": "user", "content": [{"type": "input_image", "file_id": "f1"}]}], True),
    ("/v1/responses", [{"role": "user", "content": [{"type": "input_file", "file_id": "f1"}]}], True),
    ("/v1/responses", [{"type": "function_call_output", "call_id": "c1", "output": "BAD"}], True),
    ("/v1/responses", [{"type": "item_reference", "id": "i1"}], True),
    ("/v1/chat/completions", [{"type": "image_url", "image_url": {"url": RED}}], True),
    ("/v1/chat/completions", [{"type": "file", "file": {"file_id": "f1"}}], True),
]


@pytest.mark.parametrize(("route", "said", "blocked"), ASKED)
async def test_what_a_request_holds_is_judged_or_refused(
    proxy: httpx.AsyncClient, route: str, said: Any, blocked: bool
) -> None:
    body = body_of(route, [{"role": "user", "content": said}] if route == "/v1/messages" else said)
    got = await proxy.post(route, json=body)
    assert (is_refused(got), len(UPSTREAM.asked)) == (blocked, 0 if blocked else 1), got.text


async def test_a_field_that_replaces_the_messages_is_judged(proxy: httpx.AsyncClient) -> None:
    body = body_of("/v1/chat/completions", "Hello.")
    got = await proxy.post("/v1/chat/completions", json={**body, "extra_body": {"messages": [{"content": "BAD"}]}})
    assert (is_refused(got), len(UPSTREAM.asked)) == (True, 0)


async def test_the_route_that_applies_a_guardrail(proxy: httpx.AsyncClient) -> None:
    for text, blocked in (("Hello.", False), ("BAD", True), ("BROKEN", True)):
        body = {"guardrail_name": "guardreasoner", "text": text}
        got = await proxy.post("/guardrails/apply_guardrail", json=body)
        assert (got.status_code == 200) == (not blocked)
        assert (text in got.text) == (not blocked)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/images/generations", {"model": "gpt", "prompt": "Hello."}),
        ("/v1/moderations", {"model": "gpt", "input": "Hello."}),
        ("/v1/rerank", {"model": "gpt", "query": "Hello.", "documents": ["Hello."]}),
        ("/v1/audio/speech", {"model": "gpt", "input": "Hello.", "voice": "alloy"}),
    ],
)
async def test_other_routes_are_refused(proxy: httpx.AsyncClient, route: str, body: dict[str, Any]) -> None:
    got = await proxy.post(route, json=body)
    assert (got.status_code == 200, UPSTREAM.asked) == (False, []), got.text
    assert "unknown_call" in got.text
