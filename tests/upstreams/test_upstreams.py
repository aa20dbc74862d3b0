"""The table of what a model's server may send, against the proxy, the ASGI middleware and the `openai` engine."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from guardreasoner_vl.engines.openai.engine import OpenAIEngine
from tests.engines.conformance import Pieces, asked
from tests.integrations.test_asgi import App, Instant
from tests.integrations.test_asgi import client as asgi_client
from tests.service.proxied import client as proxy_client
from tests.upstreams.table import BROKEN_STREAMS, JSON, STREAM, STREAMS, TEXT, WHOLE, WHOLE_STREAMS, Case

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.slow
CUTS = [0, 1, 5]
"""Bytes of a piece; 0 sends all at once."""

REQUEST = {"messages": [{"role": "user", "content": "Hello."}]}
cut = pytest.mark.parametrize("size", CUTS)


def cases(table: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table, ids=[case.name for case in table])


def pieces_of(body: bytes, size: int) -> list[bytes]:
    return [body[at : at + size] for at in range(0, len(body), size)] if size else [body]


class Sent(httpx.AsyncByteStream):
    """A body sent in exactly these parts."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


@dataclass
class Server:
    """A model's server that answers every chat request with the case."""

    case: Case
    size: int = 0
    fault: None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        headers = {"Content-Type": self.case.kind}
        return httpx.Response(200, headers=headers, stream=Sent(pieces_of(self.case.body, self.size)))


@dataclass
class Read:
    """What a client reads: the text, the error that it gets, and whether the stream says that it is complete."""

    text: str
    error: dict[str, Any]
    whole: bool


def read_stream(answer: httpx.Response) -> Read:
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = [part.removeprefix("data: ") for part in answer.text.split("\n\n")]
    assert last == ""
    whole = events[-1] == "[DONE]"
    chunks = [json.loads(event, parse_constant=pytest.fail) for event in events if event != "[DONE]"]
    errors = [event["error"] for event in chunks if "error" in event]
    deltas = [choice["delta"] for event in chunks for choice in event.get("choices", ())]
    assert len(errors) <= 1
    assert not errors or ("error" in chunks[-1] and list(chunks[-1]) == ["error"])
    return Read("".join(delta.get("content") or "" for delta in deltas), errors[0] if errors else {}, whole)


def read_whole(answer: httpx.Response) -> Read:
    content = json.loads(answer.content, parse_constant=pytest.fail)
    assert answer.status_code == (502 if "error" in content else 200)
    if "error" in content:
        return Read("", content["error"], False)
    (choice,) = content["choices"]
    return Read(choice["message"]["content"], {}, True)


def check(case: Case, read: Read) -> None:
    assert read.error.get("code") == case.code
    assert read.whole == (case.code is None)
    assert read.text == case.text if case.code is None else case.text.startswith(read.text)
    assert case.message in read.error.get("message", "")
    for unjudged in ("BAD", "SECRET"):
        assert unjudged not in json.dumps(read.error)
    assert not any("\ud800" <= character <= "\udfff" for character in read.text)


@cut
@cases(STREAMS)
async def test_the_proxy_streams(case: Case, size: int) -> None:
    async with proxy_client(Server(case, size)) as http:  # type: ignore[arg-type]
        check(case, read_stream(await http.post("/v1/chat/completions", json={**REQUEST, "stream": True})))


@cut
@cases(STREAMS)
async def test_the_proxy_makes_a_stream_whole_where_that_was_asked_for(case: Case, size: int) -> None:
    async with proxy_client(Server(case, size)) as http:  # type: ignore[arg-type]
        check(case, read_whole(await http.post("/v1/chat/completions", json=REQUEST)))


@cases(WHOLE)
async def test_the_proxy_answers_whole(case: Case) -> None:
    async with proxy_client(Server(case)) as http:  # type: ignore[arg-type]
        check(case, read_whole(await http.post("/v1/chat/completions", json=REQUEST)))


@cases(WHOLE)
async def test_the_proxy_streams_json_in_one_piece(case: Case) -> None:
    async with proxy_client(Server(case)) as http:  # type: ignore[arg-type]
        answer = await http.post("/v1/chat/completions", json={**REQUEST, "stream": True})
    check(case, read_whole(answer) if case.code else read_stream(answer))


@cut
@cases(STREAMS)
async def test_the_middleware_streams(case: Case, size: int) -> None:
    app = App(*pieces_of(case.body, size), kind=case.kind)
    async with asgi_client(app, Instant(), window=10) as http:  # type: ignore[arg-type]
        check(case, read_stream(await http.post("/v1/chat/completions", json=REQUEST)))


@cases(WHOLE)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_middleware_answers_in_the_application_s_form(case: Case, stream: bool) -> None:
    app = App(case.body, kind=case.kind)
    async with asgi_client(app, Instant(), window=10) as http:  # type: ignore[arg-type]
        check(case, read_whole(await http.post("/v1/chat/completions", json={**REQUEST, "stream": stream})))


@contextmanager
def engine(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIEngine]:
    good, case = Case("good", WHOLE[0].body, kind=JSON), server.case
    server.case = good
    transport = httpx.MockTransport(server)
    monkeypatch.setattr(httpx, "AsyncClient", partial(httpx.AsyncClient, transport=transport))
    connected = OpenAIEngine(base_url="http://model.test/v1").connect()
    server.case = case
    yield connected
    connected.close()


@cut
@pytest.mark.parametrize("streamed", [True, False])
@cases([*STREAMS, *WHOLE])
def test_the_engine(case: Case, streamed: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not streamed and case.kind == STREAM:
        return  # an engine that asked for no stream reads none
    listener = Pieces()
    with engine(Server(case, size), monkeypatch) as connected:
        (result,) = connected.generate([replace(asked(), listener=listener if streamed else None)])
    if case.engine_answers:
        assert (result.error, result.text) == (None, case.text)
        assert not streamed or "".join(listener.heard) == case.text
    else:
        assert (result.finish_reason, result.error_code) == ("error", "engine")
        for quoted in ("BAD", "SECRET", "died"):
            assert quoted not in (result.error or "")


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in (*STREAMS, *WHOLE)]
    assert len(set(names)) == len(names)
    assert all(case.code is None for case in WHOLE_STREAMS)
    assert all(case.code for case in BROKEN_STREAMS)
    assert TEXT.isprintable()
