"""The guarded proxy in front of a mock transport that plays the model."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import Limits, ServiceConfig, UpstreamSection
from tests.service.clients import client as client_of
from tests.service.proxied import CALL, HELLO, Model, asked, chunks_in, client, content, delta
from tests.service.running import running
from tests.service.scripted_backend import ScriptedBackend
from tests.service.test_forwarding import LETTERS, PLAIN, PNG, TEXT, image_part

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


async def test_a_harmless_exchange_passes_whole() -> None:
    model, backend = Model(), ScriptedBackend()
    async with client(model, backend) as http:
        answer = await asked(http, temperature=0.5)
    assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": "Fine."}
    sent = json.loads(model.asked[0].content)
    assert sent == {"model": "m", "messages": HELLO, "temperature": 0.5}
    assert model.asked[0].url == "http://model.test/v1/chat/completions"
    assert model.asked[0].headers["authorization"] == "Bearer upstream-key"
    assert [call.response for call in backend.judged] == [None, "Fine."]


@pytest.mark.parametrize(("text", "code"), [("BAD", "content_filter"), ("BROKEN", "guard_error")])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_blocked_request_never_reaches_the_model(text: str, code: str, stream: bool) -> None:
    model = Model()
    async with client(model) as http:
        answer = await asked(http, [{"role": "user", "content": text}], stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert not model.asked


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "BAD words"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "BROKEN"},
        {"role": "assistant", "content": [{"type": "audio", "audio": "x"}]},
        {"content": "BAD words without a role"},
    ],
)
async def test_a_blocked_answer_is_a_refusal(message: dict[str, Any]) -> None:
    async with client(Model(message)) as http:
        answer = await asked(http)
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["content"] is None
    assert choice["message"]["refusal"]
    assert "BAD" not in answer.text
    assert "logprobs" not in choice


async def test_reasoning_that_is_shown_is_judged_and_what_is_not_judged_is_not_passed_on() -> None:
    odd = {"role": "assistant", "content": "Fine.", "thoughts": "BAD plans"}
    async with client(Model(odd)) as http:
        assert (await asked(http)).json()["choices"][0]["message"] == {"role": "assistant", "content": "Fine."}
    async with client(Model({"role": "assistant", "content": "Fine.", "reasoning_content": "BAD plans"})) as http:
        answer = await asked(http)
    assert answer.json()["choices"][0]["finish_reason"] == "content_filter"
    assert "BAD" not in answer.text


async def test_a_stream_is_released_window_by_window() -> None:
    chunks = [delta(role="assistant", content=""), *(delta(content=f"word{n} ") for n in range(6)), delta("stop")]
    backend = ScriptedBackend()
    async with client(Model(chunks=chunks), backend) as http:
        answer = await asked(http, stream=True)
    assert content(answer) == "".join(f"word{n} " for n in range(6))
    assert [call.response for call in backend.judged][1:] == [
        "word0 word1 ",
        "word0 word1 word2 word3 ",
        "word0 word1 word2 word3 word4 word5 ",
    ]
    assert chunks_in(answer)[-1]["usage"] == {"total_tokens": 3}
    assert "leak" not in answer.text
    assert [part["finish_reason"] for event in chunks_in(answer) for part in event["choices"]][-1] == "stop"


async def test_a_stream_stops_where_it_turns_harmful() -> None:
    chunks = [
        *(delta(content=word) for word in ("All is well. ", "Now some ", "BAD words ", "and more.")),
        delta("stop"),
    ]
    async with client(Model(chunks=chunks)) as http:
        answer = await asked(http, stream=True)
    assert content(answer) == "All is well. "
    last = chunks_in(answer)[-1]["choices"][0]
    assert (last["finish_reason"], "refusal" in last["delta"]) == ("content_filter", True)


async def test_streamed_tool_calls_are_released_after_their_verdict() -> None:
    def pieces(argument: str) -> list[dict[str, Any]]:
        first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "bake", "arguments": '{"what"'}}
        second = {"index": 0, "function": {"arguments": f': "{argument}"}}'}}
        return [delta(role="assistant", tool_calls=[first]), delta(tool_calls=[second]), delta("tool_calls")]

    async with client(Model(chunks=pieces("bread"))) as http:
        good = await asked(http, stream=True)
    async with client(Model(chunks=pieces("BAD"))) as http:
        bad = await asked(http, stream=True)
    calls = [
        call for event in chunks_in(good) for part in event["choices"] for call in part["delta"].get("tool_calls", ())
    ]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"what": "bread"}'
    assert "BAD" not in bad.text
    assert chunks_in(bad)[-1]["choices"][0]["finish_reason"] == "content_filter"


async def test_one_bad_answer_of_several_that_are_streamed_ends_them_all() -> None:
    chunks = [{**delta(content="first part "), "index": 0}, {**delta(content="BAD first part "), "index": 1}]
    async with client(Model(chunks=chunks)) as http:
        answer = await asked(http, stream=True, n=2)
    assert content(answer) == "first part "
    ends = {part["index"]: part["finish_reason"] for event in chunks_in(answer) for part in event["choices"]}
    assert ends == {0: "content_filter", 1: "content_filter"}


async def test_monitoring_passes_everything_on() -> None:
    both = {"mode": "monitor"}
    async with client(Model({"role": "assistant", "content": "BAD"}), request=both, response=both) as http:
        answer = await asked(http, [{"role": "user", "content": "BAD"}])
    assert answer.json()["choices"][0]["message"]["content"] == "BAD"


def unreachable() -> httpx.Response:
    raise httpx.ConnectError("no route")


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (unreachable, 502),
        (lambda: httpx.Response(429, json={"error": {"message": "slow down"}}), 429),
        (lambda: httpx.Response(200, text="not json"), 502),
        (lambda: httpx.Response(200, json={"choices": [{}]}), 502),
    ],
)
async def test_a_model_that_fails(fault: Callable[[], httpx.Response], status: int) -> None:
    model = Model()
    model.fault = fault
    async with client(model) as http:
        answer = await asked(http)
    assert answer.status_code == status


class Breaking(httpx.AsyncByteStream):
    """A stream that sends something and breaks off."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'data: {"choices": [{"index": 0, "delta": {"content": "Fine"}}]}\n\n'
        raise httpx.ReadError("gone")


@pytest.mark.parametrize(
    ("stream", "code"),
    [
        (httpx.ByteStream(b"data: not json\n\n"), "guard_error"),
        (httpx.ByteStream(b'data: {"choices": [{"delta": "x"}]}\n\n'), "guard_error"),
        (Breaking(), "upstream"),
    ],
)
async def test_a_stream_that_breaks_off_ends_in_an_error(stream: httpx.AsyncByteStream, code: str) -> None:
    model = Model()
    model.fault = lambda: httpx.Response(200, stream=stream)
    async with client(model) as http:
        answer = await asked(http, stream=True)
    assert [event["error"]["code"] for event in chunks_in(answer)] == [code]


@pytest.mark.parametrize("body", [{}, {"messages": "x"}, [], {"messages": [1]}])
async def test_a_body_without_messages(body: Any) -> None:
    model = Model()
    async with client(model) as http:
        answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code in (400, 422)
    assert not model.asked


async def test_the_model_is_sent_bytes_and_never_addresses() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
    model = Model()
    async with client(model) as http:
        answer = await asked(http, [{"role": "user", "content": parts}])
    assert answer.status_code == 400
    assert not model.asked


@pytest.mark.parametrize("url", [f"data:;base64,{TEXT[:9]} {TEXT[9:]}", "https://example.org/a.png"])
async def test_the_model_is_sent_the_bytes_that_were_judged(url: str) -> None:
    """As base64 that every decoder reads alike, with a media type, which llama.cpp requires."""

    async def fetch(_: str) -> bytes:
        return PNG

    model, backend = Model(), ScriptedBackend()
    config = ServiceConfig(upstream=UpstreamSection(base_url="http://model.test/v1"))
    app = create_app(config, {"default": backend}, httpx.MockTransport(model))
    app.state.fetch = fetch
    async with client_of(app) as http:
        messages = [{"role": "user", "content": [image_part(url)]}, *HELLO]
        assert (await asked(http, messages)).status_code == 200
    sent = json.loads(model.asked[0].content)["messages"]
    assert sent[0]["content"] == [image_part(PLAIN)]
    assert backend.judged[0].all_images == (PLAIN,)


async def test_escapes_in_base64_are_refused() -> None:
    """A decoder that skips `%` reads another image than one that resolves it."""
    model = Model()
    async with client(model) as http:
        answer = await asked(http, [{"role": "user", "content": [image_part(f"{PLAIN[:-4]}%41{PLAIN[-4:]}")]}])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "guard_error")
    assert "invalid_image" in answer.text
    assert not model.asked


async def test_the_model_reads_the_texts_as_they_were_judged() -> None:
    """Chat templates put text parts together without a separator."""
    model, backend = Model(), ScriptedBackend()
    async with client(model, backend) as http:
        turns = [{"role": role, "content": LETTERS} for role in ("user", "assistant", "user")]
        assert (await asked(http, turns)).status_code == 200
    sent = [message["content"][0]["text"] for message in json.loads(model.asked[0].content)["messages"]]
    (earlier,) = backend.judged[0].history
    assert [earlier.prompt, earlier.response, backend.judged[0].prompt] == sent


class Waiting:
    """A model that answers once `awaited` chats wait for it, or `answers` is set."""

    def __init__(self, awaited: int) -> None:
        self.awaited, self.asked, self.answers = awaited, 0, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        self.asked += 1
        while not self.answers and self.asked < self.awaited:
            await asyncio.sleep(0.01)
        choice = {"index": 0, "message": {"role": "assistant", "content": "Fine."}, "finish_reason": "stop"}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"choices": [choice]}).encode()})


async def test_as_many_chats_wait_for_the_model_as_the_queue_holds() -> None:
    places = 110  # more than httpx's own limit
    async with waiting(Waiting(places), places) as http, asyncio.timeout(20):
        answers = await asyncio.gather(*(asked(http) for _ in range(places)))
    assert {answer.status_code for answer in answers} == {200}


async def test_one_chat_more_is_refused_at_once() -> None:
    model = Waiting(3)
    async with waiting(model, 2) as http, asyncio.timeout(20):
        chats = [asyncio.create_task(asked(http)) for _ in range(2)]
        while model.asked < 2:
            await asyncio.sleep(0.01)
        refused = await asked(http)
        model.answers = True
        assert [(await chat).status_code for chat in chats] == [200, 200]
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "upstream_full")
    assert refused.headers["retry-after"] == "2"


@asynccontextmanager
async def waiting(model: Waiting, places: int) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the proxy, with that many places, in front of `model` on a real port."""
    with running(model) as url:
        try:
            config = ServiceConfig(upstream=UpstreamSection(base_url=f"{url}/v1"), limits=Limits(queue=places))
            async with client_of(create_app(config, {"default": ScriptedBackend()})) as http:
                yield http
        finally:
            model.answers = True
