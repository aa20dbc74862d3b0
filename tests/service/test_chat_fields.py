"""The parts of a chat request that the proxy forwards: known fields, judged text and valid JSON."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import ServiceConfig, UpstreamSection
from guardreasoner_vl.types.exchange import REASONING
from tests.service.proxied import CALL, HELLO, Model, asked, client
from tests.service.scripted_backend import ScriptedBackend


def said(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hello.", **fields}]


def answered(**fields: Any) -> list[dict[str, Any]]:
    return [*HELLO, {"role": "assistant", "content": "Hi.", **fields}, *HELLO]


def part(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": "Hello.", **fields}]}]


IMAGE = "data:image/png;base64," + (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("documents", {"documents": [{"text": "SECRET"}]}),
    ("chat_template", {"chat_template": "SECRET"}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"note": "SECRET"}}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"SECRET words": True}}),
    ("prompt", {"prompt": "SECRET"}),
    ("continue_final_message", {"continue_final_message": True}),
    ("prediction", {"prediction": {"content": "SECRET"}}),
    ("mm_processor_kwargs", {"mm_processor_kwargs": {"max_pixels": 1}}),
    ("reasoning_effort", {"reasoning_effort": "SECRET words"}),
    ("temperature", {"temperature": "SECRET"}),
    ("stream", {"stream": "SECRET"}),
    ("whatever", {"whatever": {"note": "SECRET"}}),
    ("messages.0.name", {"messages": said(name="SECRET words")}),
    ("messages.0.thoughts", {"messages": said(thoughts="SECRET")}),
    ("messages.0.reasoning_content", {"messages": said(reasoning_content="SECRET")}),
    ("messages.0.content.cache_control", {"messages": part(cache_control={"note": "SECRET"})}),
    ("messages.0.content.image_url.note", {"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE, "note": "SECRET"}}]}]}),
    ("messages.0.content.detail", {"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": IMAGE, "detail": "SECRET words"}]}]}),
    ("messages.0.content", {"messages": [{"role": "system", "content": [{"type": "audio", "audio": "SECRET"}]}]}),
    ("messages.1.tool_calls.note", {"messages": answered(tool_calls=[{**CALL, "note": "SECRET"}])}),
    ("messages.1.tool_calls.id", {"messages": answered(tool_calls=[{**CALL, "id": "SECRET words"}])}),
    ("messages.1.tool_calls.custom", {"messages": answered(tool_calls=[{**CALL, "custom": {"input": "SECRET"}}])}),
    ("messages.1.tool_calls.function.note", {"messages": answered(tool_calls=[
        {"id": "c", "type": "function", "function": {"name": "bake", "arguments": "{}", "note": "SECRET"}}])}),
    ("messages.1.function_call.note", {"messages": answered(function_call={"name": "bake", "note": "SECRET"})}),
    ("messages.1.tool_call_id", {"messages": answered(tool_call_id="SECRET words")}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "body"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_not_judged_does_not_go_on(field: str, body: dict[str, Any], stream: bool) -> None:
    model, backend = Model(), ScriptedBackend()
    async with client(model, backend) as http:
        answer = await http.post("/v1/chat/completions", json={"messages": HELLO, "stream": stream, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (422, "invalid_request")
    assert error["message"].startswith(f"{field}: ")
    assert "SECRET" not in answer.text
    assert (model.asked, backend.judged) == ([], [])


async def test_known_fields_go_on_as_they_are() -> None:
    tool = {"type": "function", "function": {"name": "bake", "description": "Bakes.", "parameters": {}}}
    call = {"id": "call_1", "type": "function", "function": {"name": "bake", "arguments": "{}"}}
    parts = [
        {"type": "text", "text": "And this?"},
        {"type": "image_url", "image_url": {"url": IMAGE, "detail": "low"}},
    ]
    body = {
        "model": "org/model:1",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello.", "name": "Ada_1"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Flour."},
            {"role": "tool", "content": "Baked.", "tool_call_id": "call_1"},
            {"role": "user", "content": parts},
        ],
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 1, "max_tokens": 9, "seed": 3, "stop": ["x"],
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"1": 2}, "user": "someone",
        "metadata": {"a": "b"}, "max_completion_tokens": 9, "tools": [tool], "tool_choice": "auto",
        "parallel_tool_calls": False,
        "response_format": {"type": "json_object"}, "reasoning_effort": "low", "service_tier": "auto", "logprobs": True,
        "top_logprobs": 2, "chat_template_kwargs": {"enable_thinking": False, "budget": 3}, "stop_token_ids": [1, 2],
    }  # fmt: skip
    model, backend = Model(), ScriptedBackend()
    async with client(model, backend) as http:
        nothing: dict[str, Any] = {"documents": None, "annotations": [], "prompt": ""}
        answer = await http.post("/v1/chat/completions", json={**body, **nothing})
    assert answer.status_code == 200
    assert json.loads(model.asked[0].content) == body
    assert "Flour." in (backend.judged[0].history[0].response or "")


@pytest.mark.parametrize("field", REASONING)
async def test_reasoning_of_earlier_answers_is_judged(field: str) -> None:
    model = Model()
    async with client(model) as http:
        answer = await asked(http, [*HELLO, {"role": "assistant", "content": "Fine.", field: "BAD plans"}])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_filter")
    assert not model.asked


async def test_an_operator_may_pass_more_fields_on() -> None:
    fields = ("documents", "messages.thoughts", "messages.content.cache_control")
    messages = [{**part(cache_control={"type": "ephemeral"})[0], "thoughts": "x"}]
    model = Model()
    config = {"base_url": "http://model.test/v1", "pass_fields": fields}
    app = create_app(
        ServiceConfig(upstream=config), {"default": ScriptedBackend()}, httpx.MockTransport(model)  # type: ignore[arg-type]
    )  # fmt: skip
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        good = await asked(http, messages, documents=[{"text": "x"}])
        bad = await asked(http, messages, thoughts="x")
    assert (good.status_code, bad.status_code) == (200, 422)
    assert json.loads(model.asked[0].content)["messages"] == messages


@pytest.mark.parametrize("name", ["", "message.name", "messages.0.name", "messages.", "a.b"])
def test_a_name_that_no_field_has_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="write NAME"):
        UpstreamSection(pass_fields=(name,))


ODD_BODIES = [
    b'{"messages": [{"role": "user", "content": "Hello."}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "Hello."}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "Hello."}], "logit_bias": {"1": -Infinity}}',
    b'{"messages": [{"role": "user", "content": "Hello."}], "user": "\\ud83d"}',
    b'{"messages": [{"role": "user", "content": "Hello."}], "metadata": {"\\ude00": 1}}',
    b'{"messages": [{"role": "user", "content": "Hello \\ud83d."}]}',
    b'{"messages": [{"role": "system", "content": "\\udead"}, {"role": "user", "content": "Hello."}]}',
    b'{"messages": [{"role": "user", "content": "Hello."}], "tools": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"messages": [{"role": "user", "content": "Hello."}], "seed": ' + b"9" * 5000 + b"}",
    b'{"messages": [{"role": "user", "content": "Hello \xff."}]}',
]


@pytest.mark.parametrize("body", ODD_BODIES)
@pytest.mark.parametrize("stream", [b"false", b"true"])
async def test_what_is_no_json_is_said_once_and_before_anything_is_asked(body: bytes, stream: bytes) -> None:
    model, backend = Model(), ScriptedBackend()
    async with client(model, backend) as http:
        answer = await http.post("/v1/chat/completions", content=body[:-1] + b', "stream": ' + stream + b"}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
    assert (model.asked, backend.judged) == ([], [])


async def test_two_fields_of_one_name_go_on_as_the_one_that_was_judged() -> None:
    model = Model()
    body = b'{"messages": [{"role": "user", "content": "BAD"}], "messages": [{"role": "user", "content": "Hello."}]}'
    async with client(model) as http:
        assert (await http.post("/v1/chat/completions", content=body)).status_code == 200
    assert model.asked[0].content == b'{"messages":[{"role":"user","content":"Hello."}]}'
