"""The ASGI middleware around an application with scripted answers."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guardreasoner_vl.integrations.asgi import GuardMiddleware
from guardreasoner_vl.types.exchange import REASONING
from tests.integrations.examples import example
from tests.integrations.service import GREEN, KEY, RED, Running, chunk, completion, image_part, sse
from tests.service.proxied import chunks_in
from tests.service.running import running as running_app
from tests.service.test_chat_fields import ODD_BODIES, REFUSED
from tests.service.verdicts import verdict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from guardreasoner_vl.integrations import GuardClient
    from guardreasoner_vl.types import Verdict

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello."}]
CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "bake", "arguments": '{"what": "BAD"}'}}
FINE = "Fine words. " * 8


class App:
    """Sends `pieces` of a body; records the requests."""

    def __init__(
        self, *pieces: str | bytes, kind: str = "application/json", status: int = 200, encoding: str = "identity"
    ) -> None:
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
        self.status, self.headers = status, {"content-type": kind, "content-encoding": encoding}
        self.asked: list[bytes] = []
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.asked.append(body)
        headers = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})


def streaming(*events: str | dict[str, Any]) -> App:
    lines = [event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n" for event in events]
    return App(*lines, kind="text/event-stream; charset=utf-8")


@asynccontextmanager
async def client(app: Any, guard: GuardClient, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(GuardMiddleware(app, guard, **{"window": 40, **options}))
    async with httpx.AsyncClient(transport=transport, base_url="http://app.test") as http_client:
        yield http_client


async def asked(app: Any, guard: Any, messages: Any = HELLO, **body: Any) -> httpx.Response:
    async with client(app, guard) as http:
        return await http.post(PATH, json={"messages": messages, **body})


def text_of(answer: httpx.Response) -> str:
    deltas = [choice["delta"] for one in chunks_in(answer) for choice in one.get("choices", ())]
    return "".join(delta.get("content") or "" for delta in deltas)


# Requests


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("Hello.", None),
        ("BAD", "content_filter"),
        ("BROKEN", "guard_error"),
        ([image_part(GREEN)], None),
        ([image_part(RED)], "content_filter"),
        ([image_part("https://images.test/a.png")], "guard_error"),
        ([{"type": "input_audio", "input_audio": {}}], "guard_error"),
    ],
)
async def test_a_request_is_judged_before_the_application_sees_it(guard: GuardClient, content: Any, code: Any) -> None:
    app = App(json.dumps(completion("Gladly.")))
    answer = await asked(app, guard, [{"role": "user", "content": content}])
    assert len(app.asked) == (code is None)
    assert answer.status_code == (200 if code is None else 400)
    assert answer.json().get("error", {}).get("code") == code


async def test_without_a_service_everything_is_blocked(down: GuardClient) -> None:
    app = App(json.dumps(completion("Gladly.")))
    answer = await asked(app, down)
    assert (answer.status_code, answer.json()["error"]["code"], app.asked) == (400, "guard_error", [])


async def test_the_application_gets_what_was_judged(guard: GuardClient) -> None:
    """Two parsers may disagree about JSON with a duplicate key."""
    app = App(json.dumps(completion("Gladly.")))
    body = '{"messages": [{"role": "user", "content": "BAD"}], "n": 1, "messages": [{"role": "user", "content": "Hi"}]}'
    async with client(app, guard) as http:
        assert (await http.post(PATH, content=body)).status_code == 200
    assert json.loads(app.asked[0], object_pairs_hook=list) == [
        ("messages", [[("role", "user"), ("content", "Hi")]]),
        ("n", 1),
    ]
    headers = dict(app.scopes[0]["headers"])
    assert headers[b"content-length"] == str(len(app.asked[0])).encode()
    assert b"accept-encoding" not in headers
    assert app.scopes[0]["extensions"] == {}


async def test_the_application_reads_texts_and_images_as_they_were_judged(guard: GuardClient, service: Running) -> None:
    app, judged = App(json.dumps(completion("Gladly."))), len(service.backend.judged)
    spaced = image_part(f"{GREEN[:40]} {GREEN[40:]}")
    letters = [{"type": "text", "text": letter} for letter in "How"]
    assert (await asked(app, guard, [{"role": "user", "content": [*letters, spaced]}])).status_code == 200
    (message,) = json.loads(app.asked[0])["messages"]
    assert message["content"] == [{"type": "text", "text": "H\no\nw"}, image_part(GREEN)]
    exchange = service.backend.judged[judged]
    assert (exchange.prompt, exchange.images) == ("H\no\nw", (GREEN,))


class Fetching:
    """A guard whose service fetches images and finds everything harmless."""

    async def ajudge(self, messages: Any) -> Verdict:
        return verdict(harmful=False)


ADDRESS = image_part("https://images.test/a.png")


@pytest.mark.parametrize(
    ("messages", "remote_images", "passes"),
    [
        ([{"role": "user", "content": [ADDRESS]}], False, False),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": " HTTPS://images.test/a"}]}], False, False),
        ([{"role": "user", "content": [ADDRESS]}, {"role": "assistant", "content": "Nice."}, *HELLO], False, False),
        ([{"role": "user", "content": [ADDRESS]}], True, True),
        ([{"role": "system", "content": [ADDRESS]}, *HELLO], False, True),
    ],
)
async def test_an_image_s_address_reaches_the_application_by_choice_only(
    messages: Any, remote_images: bool, passes: bool
) -> None:
    app, guard = App(json.dumps(completion("Gladly."))), cast("GuardClient", Fetching())
    async with client(app, guard, remote_images=remote_images) as http:
        answer = await http.post(PATH, json={"messages": messages})
    assert (answer.status_code, len(app.asked)) == ((200, 1) if passes else (400, 0))
    assert answer.json().get("error", {}).get("code") == (None if passes else "guard_error")


async def test_escapes_in_base64_do_not_reach_the_application(guard: GuardClient) -> None:
    app = App(json.dumps(completion("Gladly.")))
    answer = await asked(app, guard, [{"role": "user", "content": [image_part(f"{GREEN[:-4]}%41{GREEN[-4:]}")]}])
    assert (answer.json()["error"]["code"], app.asked) == ("guard_error", [])


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"messages"', b"{}", b'{"messages": 1}', b"\xff", b"[" * 100_000])
async def test_what_is_no_chat_is_refused(guard: GuardClient, body: bytes) -> None:
    app = App(json.dumps(completion("Gladly.")))
    async with client(app, guard) as http:
        assert (await http.post(PATH, content=body)).json()["error"]["code"] == "invalid_request"
    assert app.asked == []


@pytest.mark.parametrize(("field", "body"), REFUSED)
async def test_what_is_not_judged_does_not_go_on(guard: GuardClient, field: str, body: dict[str, Any]) -> None:
    app = App(json.dumps(completion("Gladly.")))
    answer = await asked(app, guard, **{"messages": HELLO, **body})
    assert (answer.status_code, answer.json()["error"]["code"], app.asked) == (422, "invalid_request", [])
    assert answer.json()["error"]["message"].startswith(f"{field}: ")


@pytest.mark.parametrize("body", ODD_BODIES)
async def test_what_is_no_json_is_refused(guard: GuardClient, body: bytes) -> None:
    app = App(json.dumps(completion("Gladly.")))
    async with client(app, guard) as http:
        answer = await http.post(PATH, content=body)
    assert (answer.status_code, answer.json()["error"]["code"], app.asked) == (422, "invalid_request", [])


async def test_more_fields_pass_where_the_application_allows_them(guard: GuardClient) -> None:
    app = App(json.dumps(completion("Gladly.")))
    async with client(app, guard, pass_fields=["documents"]) as http:
        for field, status in (("documents", 200), ("prompt", 422)):
            assert (await http.post(PATH, json={"messages": HELLO, field: "x"})).status_code == status


@pytest.mark.parametrize("field", REASONING)
async def test_reasoning_of_earlier_answers_is_judged(guard: GuardClient, field: str) -> None:
    app = App(json.dumps(completion("Gladly.")))
    answer = await asked(app, guard, [*HELLO, {"role": "assistant", "content": "Fine.", field: "BAD"}])
    assert (answer.json()["error"]["code"], app.asked) == ("content_filter", [])


async def test_a_long_body_is_refused(guard: GuardClient) -> None:
    app = App(json.dumps(completion("Gladly.")))
    async with client(app, guard, max_bytes=1_000) as http:
        assert (await http.post(PATH, content=b"x" * 1_001)).status_code == 413
    assert app.asked == []


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/V1/Chat/Completions", "/mounted/chat/completions"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PROPFIND"])
async def test_no_other_spelling_of_the_route_passes(guard: GuardClient, path: str, method: str) -> None:
    app = App(json.dumps(completion("Gladly.")))
    async with client(app, guard) as http:
        answer = await http.request(method, path, json={"messages": [{"role": "user", "content": "BAD"}]})
    assert (answer.status_code, app.asked) == (400, [])


async def test_other_routes_are_left_alone(down: GuardClient) -> None:
    app = App(b"\x00 whatever", kind="image/png")
    async with client(app, down) as http:
        assert (await http.post("/v1/other", content=b"BAD")).content == b"\x00 whatever"
        assert (await http.get(PATH)).content == b"\x00 whatever"


# Answers


@pytest.mark.parametrize(
    "message",
    [
        {"content": "BAD"},
        {"content": "BROKEN"},
        {"content": [{"type": "text", "text": "BAD"}]},
        {"content": "Fine.", "reasoning_content": "BAD"},
        {"content": None, "refusal": "BAD"},
        {"content": None, "tool_calls": [CALL]},
        {"content": None, "function_call": CALL["function"]},
    ],
)
async def test_an_answer_is_judged_whatever_it_is_made_of(guard: GuardClient, message: dict[str, Any]) -> None:
    whole = completion("")
    whole["choices"][0]["message"] |= message
    answer = await asked(App(json.dumps(whole)), guard)
    choice = answer.json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("content_filter", None)
    assert "BAD" not in answer.text
    assert "BROKEN" not in answer.text


async def test_an_allowed_answer_leaves_as_it_is_but_for_what_was_not_judged(guard: GuardClient) -> None:
    whole = completion("Gladly.")
    odd = json.loads(json.dumps(whole))
    odd["choices"][0]["message"]["thoughts"] = odd["choices"][0]["thoughts"] = odd["thoughts"] = "BAD"
    answer = await asked(App(json.dumps(odd)), guard)
    assert answer.json() == whole
    assert int(answer.headers["content-length"]) == len(answer.content)


async def test_each_of_several_answers_is_judged_for_itself(guard: GuardClient) -> None:
    whole = completion("Gladly.")
    second = json.loads(json.dumps(whole["choices"][0])) | {"index": 1}
    second["message"]["content"] = "BAD"
    whole["choices"].append(second)
    choices = (await asked(App(json.dumps(whole)), guard)).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "content_filter"]


@pytest.mark.parametrize(
    "app",
    [
        App("BAD"),
        App(""),
        App('{"choices": [{"text": "BAD"}]}'),
        App('{"choices": 1}'),
        App("BAD", kind="text/plain"),
        App("BAD", kind=""),
        App(json.dumps(completion("Gladly.")), encoding="gzip"),
    ],
)
async def test_what_cannot_be_read_does_not_leave(guard: GuardClient, app: App) -> None:
    answer = await asked(app, guard)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "guard_error")


async def test_the_applications_own_error_passes(guard: GuardClient) -> None:
    answer = await asked(App('{"error": "busy"}', status=503), guard)
    assert (answer.status_code, answer.json()) == (503, {"error": "busy"})


# Streams


@pytest.mark.parametrize("ending", ["BAD", "BROKEN", "fine."])
async def test_a_stream_is_held_back_until_it_was_judged(guard: GuardClient, ending: str) -> None:
    answer = await asked(streaming(*sse(FINE + ending)), guard, stream=True)
    last = chunks_in(answer)[-1]["choices"][0]
    if ending == "fine.":
        assert (text_of(answer), last["finish_reason"]) == (FINE + ending, "stop")
    else:
        assert last["finish_reason"] == "content_filter"
        assert last["delta"]["refusal"]
        assert 0 < len(text_of(answer)) < len(FINE)
        assert ending not in answer.text


async def test_pieces_cut_anywhere_are_put_together(guard: GuardClient) -> None:
    body = "".join(sse(FINE)).replace("\n\n", "\r\n\r\n")
    app = App(*(body[at : at + 7] for at in range(0, len(body), 7)), kind="text/event-stream")
    assert text_of(await asked(app, guard)) == FINE


@pytest.mark.parametrize(
    "deltas",
    [
        [{"reasoning_content": "B"}, {"reasoning_content": "AD"}],
        [{"refusal": "BAD"}],
        [{"tool_calls": [CALL]}],
        [
            {"tool_calls": [{"function": {"name": "bake", "arguments": '{"B'}}]},
            {"tool_calls": [{"function": {"arguments": 'AD"}'}}]},
        ],
        [{"tool_calls": [{"type": "custom", "custom": {"name": "bake", "input": "BAD"}}]}],
        [{"function_call": {"name": "bake", "arguments": "BAD"}}],
    ],
)
async def test_a_stream_is_judged_whatever_it_is_made_of(guard: GuardClient, deltas: list[dict[str, Any]]) -> None:
    answer = await asked(streaming(*map(chunk, deltas), chunk({}, "stop")), guard)
    assert chunks_in(answer)[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert len(chunks_in(answer)) == 1


async def test_no_piece_of_a_tool_call_leaves_before_the_end(guard: GuardClient) -> None:
    pieces = [{"tool_calls": [{"index": 0, "function": {"arguments": "x" * 30}}]} for _ in range(4)]
    app = streaming(chunk({"content": FINE}), *map(chunk, pieces), chunk({}, "tool_calls"))
    answer = await asked(app, guard)
    assert len(chunks_in(answer)) == 6
    bad = streaming(chunk({"content": FINE}), *map(chunk, pieces), chunk({"content": "BAD"}, "tool_calls"))
    answer = await asked(bad, guard)
    assert [one["choices"][0]["finish_reason"] for one in chunks_in(answer)] == [None, "content_filter"]


async def test_one_bad_answer_of_several_ends_them_all(guard: GuardClient) -> None:
    app = streaming(chunk({"content": "Fine."}), chunk({"content": "BAD"}, index=1), *sse(FINE))
    answer = await asked(app, guard)
    assert [choice["index"] for choice in chunks_in(answer)[-1]["choices"]] == [0, 1]
    assert text_of(answer) == ""


@pytest.mark.parametrize(
    "event",
    [
        "data: BAD\n\n",
        "data: []\n\n",
        'data: {"choices": [1]}\n\n',
        'data: {"choices": [{"delta": {"content": ["BAD"]}}]}\n\n',
    ],
)
async def test_a_stream_that_cannot_be_read_ends(guard: GuardClient, event: str) -> None:
    answer = await asked(streaming(event, *sse(FINE)), guard)
    assert [one["error"]["code"] for one in chunks_in(answer)] == ["guard_error"]


async def test_nothing_but_judged_fields_leaves(guard: GuardClient) -> None:
    odd = chunk({"content": "Fine.", "thoughts": "BAD"})
    odd["choices"][0] |= {"logprobs": {"content": [{"token": "BAD"}]}, "text": "BAD"}
    odd |= {"thoughts": "BAD", "usage": {"total_tokens": 3}}
    odd["choices"][0]["delta"] |= {"role": "BAD", "tool_calls": [{**CALL, "thoughts": "BAD", "id": "BAD thoughts"}]}
    answer = await asked(streaming(": BAD\n\n", "event: BAD\nid: BAD\n\n", odd, chunk({}, "stop")), Instant())
    assert chunks_in(answer)[-1]["choices"][0]["finish_reason"] == "content_filter"  # the call's own arguments
    odd["choices"][0]["delta"]["tool_calls"][0]["function"] = {"name": "bake", "arguments": "{}", "thoughts": "BAD"}
    first, last = chunks_in(await asked(streaming(odd, chunk({}, "stop")), guard))
    call = {"index": 0, "type": "function", "function": {"name": "bake", "arguments": "{}"}}
    delta = {"role": "assistant", "content": "Fine.", "tool_calls": [call]}
    assert first == {**chunk(delta), "usage": {"total_tokens": 3}}
    assert last == chunk({}, "stop")


class Instant:
    """A guard without a service: BAD blocks."""

    async def ajudge(self, messages: Any) -> Verdict:
        return verdict("BAD" in json.dumps(messages))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("BADx ", max_size=60), cuts=st.lists(st.integers(1, 9), min_size=1), window=st.integers(1, 50))
async def test_however_it_is_cut_nothing_bad_leaves(text: str, cuts: list[int], window: int) -> None:
    pieces: list[dict[str, Any]] = []
    at = 0
    while at < len(text):
        length = cuts[len(pieces) % len(cuts)]
        pieces.append(chunk({"content": text[at : at + length]}))
        at += length
    async with client(streaming(*pieces, "data: [DONE]\n\n"), Instant(), window=window) as http:  # type: ignore[arg-type]
        shown = text_of(await http.post(PATH, json={"messages": HELLO}))
    assert text.startswith(shown)
    assert "BAD" not in shown
    assert shown == text or "BAD" in text


# The example, under a real server


def test_the_example(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_URL", service.url)
    monkeypatch.setenv("GUARD_KEY", KEY)
    with running_app(example("asgi_middleware.py")["app"]) as url, httpx.Client(base_url=url) as http:
        said = {word: {"messages": [{"role": "user", "content": word}]} for word in ("Hello there.", "BAD")}
        assert http.post(PATH, json=said["Hello there."]).json()["choices"][0]["message"]["content"] == "Hello there."
        streamed = http.post(PATH, json={**said["Hello there."], "stream": True})
        assert text_of(streamed) == "Hello there. "
        assert http.post(PATH, json=said["BAD"]).json()["error"]["code"] == "content_filter"
