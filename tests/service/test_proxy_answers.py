"""The parts of a model's answer that the proxy sends, in every form of answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from guardreasoner_vl.types.exchange import REASONING
from tests.service.proxied import Model, asked, chunks_in, client, content, delta
from tests.service.scripted_backend import ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.mark.parametrize("field", REASONING)
@pytest.mark.parametrize(("text", "passes"), [("Some plans", True), ("BAD plans", False)])
async def test_a_model_s_reasoning_is_judged_and_passed_on(field: str, text: str, passes: bool) -> None:
    message = {"role": "assistant", "content": "Fine.", field: text}
    model = Model(
        message, [delta(**{field: text[:5]}), delta(**{field: text[5:]}), delta(content="Fine."), delta("stop")]
    )
    async with client(model) as http:
        whole, streamed = await asked(http), await asked(http, stream=True)
    (choice,) = whole.json()["choices"]
    reasoning = "".join(one["delta"].get(field) or "" for event in chunks_in(streamed) for one in event["choices"])
    if passes:
        assert (choice["message"], reasoning) == (message, text)
    else:
        assert choice["finish_reason"] == "content_filter"
        assert "BAD" not in whole.text + streamed.text


async def test_nothing_of_a_call_leaves_but_what_was_judged() -> None:
    function = {"name": "bake", "arguments": "{}", "thoughts": "BAD"}
    call = {
        "id": "c1",
        "type": "function",
        "function": function,
        "custom": {"name": "x", "input": "BAD"},
        "note": "BAD",
    }
    parts = [{"type": "text", "text": "Fine.", "annotations": ["BAD"]}]
    message = {"role": "BAD", "content": parts, "tool_calls": [call], "function_call": function}
    chunks = [delta(role="BAD", tool_calls=[{"index": 0, **call}], function_call=function), delta("tool_calls")]
    async with client(Model(message, chunks)) as http:
        whole, streamed = await asked(http), await asked(http, stream=True)
    clean = {"id": "c1", "type": "function", "function": {"name": "bake", "arguments": "{}"}}
    message = whole.json()["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": [{"type": "text", "text": "Fine."}],
        "tool_calls": [clean],
        "function_call": clean["function"],
    }
    assert chunks_in(streamed)[0]["choices"][0]["delta"]["tool_calls"] == [{"index": 0, **clean}]
    assert "BAD" not in whole.text + streamed.text


@pytest.mark.parametrize(
    "odd", [{"index": "BAD"}, {"index": -1}, {"finish_reason": "BAD words"}, {"finish_reason": {}}]
)
async def test_a_choice_of_another_shape_is_no_answer(odd: dict[str, Any]) -> None:
    choice = {"index": 0, "message": {"content": "Fine."}, "finish_reason": "stop", **odd}
    model = Model(chunks=[{**delta("stop", content="Fine."), **odd}])
    async with client(model) as http:
        streamed = await asked(http, stream=True)
        model.fault = lambda: httpx.Response(200, json={"choices": [choice]})
        whole = await asked(http)
    assert [event["error"]["code"] for event in chunks_in(streamed)] == ["guard_error"]
    assert (whole.status_code, whole.json()["error"]["code"]) == (502, "guard_error")


async def test_calls_cut_within_a_character_are_whole() -> None:
    def piece(text: str, **more: Any) -> dict[str, Any]:
        return delta(tool_calls=[{"index": 0, "function": {"arguments": text, **more}}])

    model = Model(chunks=[piece('{"what": "\ud83d', name="bake"), piece('\ude00"}'), delta("tool_calls")])
    backend = ScriptedBackend()
    async with client(model, backend) as http:
        answer = await asked(http, stream=True)
    calls = [
        call
        for event in chunks_in(answer)
        for choice in event["choices"]
        for call in choice["delta"].get("tool_calls", ())
    ]
    assert [call["function"]["arguments"] for call in calls] == ['{"what": "', '\U0001f600"}']
    assert backend.judged[-1].response == 'bake({"what": "\U0001f600"})'


async def test_an_answer_in_another_form_keeps_its_calls_and_is_judged() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "bake", "arguments": '{"a": 1}'}}
    pieces = [
        {"index": 0, **call, "function": {"name": "bake", "arguments": '{"a"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
    ]
    chunks = [delta(role="assistant", tool_calls=pieces[:1]), delta(tool_calls=pieces[1:]), delta("tool_calls")]
    body = "".join(f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\n" for choice in chunks)
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    model = Model()
    async with client(model) as http:
        model.fault = lambda: httpx.Response(200, text=body, headers={"content-type": "text/event-stream"})
        whole = (await asked(http)).json()
        model.fault = lambda: httpx.Response(
            200, json={"choices": [{"message": message, "finish_reason": "tool_calls"}]}
        )
        streamed = chunks_in(await asked(http, stream=True))
        model.fault = lambda: httpx.Response(200, json={"choices": [{"message": {"content": "BAD"}}]})
        blocked = chunks_in(await asked(http, stream=True))
    assert whole["choices"] == [{"index": 0, "message": message, "finish_reason": "tool_calls"}]
    assert whole["object"] == "chat.completion"
    assert streamed[0]["choices"][0]["delta"]["tool_calls"] == [{"index": 0, **call}]
    assert blocked[0]["choices"][0]["finish_reason"] == "content_filter"
    assert "BAD" not in json.dumps(blocked)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_upstream_s_own_error_leaves_without_what_it_quotes(stream: bool) -> None:
    error = {"message": "no such tool", "type": "tool_use_failed", "code": 400, "failed_generation": "BAD"}
    model = Model()
    model.fault = lambda: httpx.Response(400, json={"error": error, "choices": ["BAD"]}, headers={"Retry-After": "3"})
    async with client(model) as http:
        answer = await asked(http, stream=stream)
        model.fault = lambda: httpx.Response(503, text="<html>BAD</html>")
        page = await asked(http, stream=stream)
        model.fault = lambda: httpx.Response(307, headers={"location": "http://elsewhere.test"})
        moved = await asked(http, stream=stream)
    assert answer.json()["error"] == {"message": "no such tool", "type": "tool_use_failed", "param": None, "code": 400}
    assert (answer.status_code, answer.headers["retry-after"]) == (400, "3")
    assert (page.status_code, page.json()["error"]["code"]) == (503, "upstream")
    assert (moved.status_code, moved.json()["error"]["code"]) == (502, "upstream")
    assert "BAD" not in answer.text + page.text


async def test_an_upstream_s_own_error_is_judged_as_one_in_an_answer_is() -> None:
    model = Model()
    reported = {
        "message": "the model wrote: BAD",
        "type": "BAD words",
        "param": "messages[0].content",
        "code": "too_long",
    }
    model.fault = lambda: httpx.Response(400, json={"error": reported})
    async with client(model) as http:
        answer = await asked(http)
    assert answer.status_code == 400
    assert "BAD" not in answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("guard_error", "messages[0].content", "too_long")


@pytest.mark.parametrize("name", ["content", "refusal"])
async def test_tokens_that_the_message_does_not_hold_are_judged(name: str) -> None:
    """A server may omit the reasoning from the message but not from the log-probabilities."""
    message = {"role": "assistant", "content": "Fine, yes."}

    def answering(*tokens: str) -> httpx.Response:
        listed = [{"token": token, "logprob": -0.5, "note": "BAD"} for token in tokens]
        choice = {"index": 0, "message": message, "logprobs": {name: listed, "tokens": ["BAD"]}}
        return httpx.Response(200, json={"choices": [choice]})

    backend, model = ScriptedBackend(), Model()
    async with client(model, backend) as http:
        model.fault = lambda: answering("Fine", ", yes", ".")
        (plain,) = (await asked(http)).json()["choices"]
        model.fault = lambda: answering("<think>", "BA", "D", "</think>", "Fine", ", yes", ".")
        (hidden,) = (await asked(http)).json()["choices"]
    assert [token["token"] for token in plain["logprobs"][name]] == ["Fine", ", yes", "."]
    assert "BAD" not in str(plain)
    assert backend.judged[1].response == "Fine, yes."
    assert hidden["finish_reason"] == "content_filter"
    assert "logprobs" not in hidden


async def test_a_stream_without_end_is_not_held_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guardreasoner_vl.service.answers.MAX_BYTES", 20_000)
    call = {"index": 0, "function": {"name": "bake", "arguments": "a" * 500}}
    for chunk, most in ((delta(tool_calls=[call]), 40), (delta(), 200)):
        model = Model(chunks=[*[chunk] * (most + 1), delta("stop")])
        async with client(model) as http:
            events = chunks_in(await asked(http, stream=True))
        assert [event["error"]["code"] for event in events] == ["upstream"]


async def test_a_success_of_any_number_is_judged() -> None:
    model = Model()
    model.fault = lambda: httpx.Response(201, json={"choices": [{"message": {"content": "BAD"}}]})
    async with client(model) as http:
        assert "BAD" not in (await asked(http)).text


async def test_a_connection_lost_after_the_answer_s_end_loses_nothing() -> None:
    class Late(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield f"data: {json.dumps({'choices': [delta('stop', content='Fine.')]})}\n\n".encode()
            raise httpx.ReadError("gone")

    model = Model()
    model.fault = lambda: httpx.Response(200, stream=Late())
    async with client(model) as http:
        assert content(await asked(http, stream=True)) == "Fine."
