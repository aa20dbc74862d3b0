"""Refused requests: their codes, the reasons they are counted under, and the limits to the byte."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from guardreasoner_vl.service import access
from guardreasoner_vl.service.access import Access, RefusedRequestError
from guardreasoner_vl.service.callers import Callers
from guardreasoner_vl.service.config import Limits, ServiceConfig
from guardreasoner_vl.service.metrics import Metrics
from tests.service.clients import KEY, app_of, client
from tests.service.scripted_backend import ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

LIMIT = 1_000
BEARER = {"Authorization": f"Bearer {KEY}"}
HOSTS: dict[str, Any] = {"keys": (KEY,), "allowed_hosts": ("guard.example",)}


def body(size: int) -> bytes:
    """A harmless exchange of exactly that many bytes."""
    frame = b'{"prompt": "%s"}'
    return frame % (b"x" * (size - len(frame % b"")))


async def counts(http: httpx.AsyncClient) -> dict[str, float]:
    """The refusals by reason, without reasons at 0."""
    families = text_string_to_metric_families((await http.get("/metrics", headers=BEARER)).text)
    samples = [
        sample for family in families for sample in family.samples if sample.name == "guardreasoner_refused_total"
    ]
    return {sample.labels["reason"]: sample.value for sample in samples if sample.value}


@pytest.mark.parametrize("host", ["guard.example", "GUARD.example:8800", "localhost", "127.0.0.1", "[::1]:8800"])
async def test_named_hosts_are_served_with_a_key(host: str) -> None:
    async with client(app_of(**HOSTS), KEY) as http:
        answer = await http.post("/v1/guard", json={"prompt": "Hello."}, headers={"host": host})
    assert answer.status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "guard.example.evil", "evil.example:8800", ""])
@pytest.mark.parametrize("path", ["/v1/guard", "/v1/moderations"])
async def test_where_hosts_are_named_a_key_opens_no_other(host: str, path: str) -> None:
    backend = ScriptedBackend()
    async with client(app_of(backend, **HOSTS), KEY) as http:
        answer = await http.post(path, json={"prompt": "Hello.", "input": "Hello."}, headers={"host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (421, "bad_host")
    assert not backend.judged


async def test_where_no_host_is_named_the_key_alone_decides() -> None:
    async with client(app_of(keys=(KEY,)), KEY) as http:
        answer = await http.post("/v1/guard", json={"prompt": "Hello."}, headers={"host": "any.example"})
    assert answer.status_code == 200


@pytest.mark.parametrize("listening", ["0.0.0.0", "::"])
async def test_all_addresses_at_once_are_no_name(listening: str) -> None:
    async with client(app_of(**HOSTS, host=listening), KEY) as http:
        for host, status in (("0.0.0.0", 421), ("[::]", 421), ("localhost", 200), ("guard.example", 200)):
            answer = await http.post("/v1/guard", json={"prompt": "Hello."}, headers={"host": host})
            assert answer.status_code == status, host


async def untold(content: bytes) -> AsyncIterator[bytes]:
    """The body in pieces, so that no header gives its length."""
    for start in range(0, len(content), 300):
        yield content[start : start + 300]


@pytest.mark.parametrize("has_length", [True, False])
@pytest.mark.parametrize(("size", "status"), [(LIMIT - 1, 200), (LIMIT, 200), (LIMIT + 1, 413)])
async def test_the_limit_is_the_last_byte_that_is_let_in(size: int, status: int, has_length: bool) -> None:
    backend = ScriptedBackend()
    assert len(body(size)) == size
    content = body(size) if has_length else untold(body(size))
    async with client(app_of(backend, limits={"body_bytes": LIMIT})) as http:
        answer = await http.post("/v1/guard", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status
        assert await counts(http) == ({} if status == 200 else {"too_large": 1})
    assert len(backend.judged) == (status == 200)


@pytest.mark.parametrize(
    ("headers", "content", "status", "code", "remedy"),
    [
        ({}, body(20), 401, "unauthorised", "Authorization: Bearer KEY"),
        ({"Authorization": "Bearer another-key-of-some-length"}, body(20), 401, "unauthorised", "give a key"),
        (
            {**BEARER, "host": "evil.example"},
            body(20),
            421,
            "bad_host",
            "this Host is not served: add it to allowed_hosts",
        ),
        ({**BEARER, "origin": "https://evil.example"}, body(20), 403, "bad_origin", "see allowed_origins"),
        ({**BEARER, "origin": "http://["}, body(20), 403, "bad_origin", "see allowed_origins"),
        ({"origin": "http://[::1"}, body(20), 403, "bad_origin", "see allowed_origins"),
        (BEARER, body(LIMIT + 1), 413, "too_large", "more than 1,000 bytes: send less"),
    ],
)
async def test_a_refusal_has_its_code_and_is_counted_once(
    headers: dict[str, str], content: bytes, status: int, code: str, remedy: str
) -> None:
    backend = ScriptedBackend()
    async with client(app_of(backend, **HOSTS, limits={"body_bytes": LIMIT})) as http:
        answer = await http.post("/v1/guard", content=content, headers={"content-type": "application/json", **headers})
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code
        assert remedy in answer.json()["error"]["message"]
        assert answer.headers["connection"] == "close"  # the rest of the body is not read
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
        assert await counts(http) == {code: 1}
    assert not backend.judged


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER   {KEY} "])
async def test_the_scheme_is_read_in_any_case_and_any_number_of_spaces_may_follow(header: str) -> None:
    async with client(app_of(keys=(KEY,))) as http:
        answer = await http.post("/v1/guard", json={"prompt": "Hello."}, headers={"Authorization": header})
    assert answer.status_code == 200


@pytest.mark.parametrize("header", [f"Basic {KEY}", KEY, f"Bearer{KEY}", "Bearer", f"Bearer of {KEY}"])
async def test_any_other_authorization_is_refused_with_its_remedy(header: str) -> None:
    async with client(app_of(keys=(KEY,))) as http:
        answer = await http.post("/v1/guard", json={"prompt": "Hello."}, headers={"Authorization": header})
    assert answer.status_code == 401
    assert answer.json()["error"]["message"] == "give a key: Authorization: Bearer KEY"


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/guard", "/v1/moderations", "/v1/guard/stream"])
async def test_a_body_that_grows_too_large_is_counted_once_for_its_caller(path: str) -> None:
    async with client(app_of(keys=(KEY,), limits={"body_bytes": LIMIT}), KEY) as http:
        kind = "application/x-ndjson" if path.endswith("stream") else "application/json"
        lines = b"\n".join([b'{"prompt": "Hello."}', *[b'{"delta": "some words"}'] * 100])
        await http.post(path, content=untold(lines), headers={"content-type": kind})
        assert await counts(http) == {"too_large": 1}
        text = (await http.get("/metrics")).text
    assert 'guardreasoner_caller_refused_total{caller="key-1",reason="too_large"} 1.0' in text


async def test_a_body_that_comes_too_slowly_is_counted() -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(0.2)
        yield b"}"

    async with client(app_of(keys=(KEY,), limits={"body_seconds": 0.1}), KEY) as http:
        answer = await http.post("/v1/guard", content=slow(), headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "too_slow")
        assert answer.json()["error"]["message"] == "the request took too long to arrive: send it again"
        assert await counts(http) == {"too_slow": 1}
        text = (await http.get("/metrics")).text
    assert 'guardreasoner_caller_refused_total{caller="key-1",reason="too_slow"} 1.0' in text


@pytest.mark.parametrize("request_id", ["a", "x" * 128, "job-7/step_2:retry=1+1@host.example"])
async def test_a_request_id_that_is_safe_to_repeat_is_kept(request_id: str) -> None:
    async with client(app_of()) as http:
        answer = await http.get("/healthz", headers={"X-Request-Id": request_id})
    assert answer.headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "x" * 129, "two words", "<b>", '"', "a\\n", "a;b", "caf\u00e9", "a\tb"])
async def test_any_other_request_id_is_replaced(request_id: str) -> None:
    async with client(app_of()) as http:
        answer = await http.get("/healthz", headers={b"X-Request-Id": request_id.encode()})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def layer(app: Any) -> Access:
    config = ServiceConfig(limits=Limits(body_bytes=LIMIT))
    return Access(app, config, Metrics(), Callers(config))


async def test_what_is_no_request_passes_untouched() -> None:
    seen: list[Any] = []

    async def app(*request_id: Any) -> None:
        seen.extend(request_id)

    async def receive() -> Any: ...

    async def send(_: Any) -> None: ...

    scope = {"type": "lifespan"}
    await layer(app)(scope, receive, send)
    assert seen == [scope, receive, send]


async def test_an_answer_that_has_begun_is_not_answered_again() -> None:
    sent: list[str] = []

    async def app(_: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * (LIMIT + 1), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    scope = {"type": "http", "method": "POST", "path": "/v1/guard", "headers": [(b"host", b"localhost")]}
    with pytest.raises(RefusedRequestError) as caught:
        await layer(app)(scope, receive, send)
    assert caught.value.code == "too_large"
    assert sent == ["http.response.start"]


async def test_every_request_leaves_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    trace = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    with caplog.at_level(logging.INFO):
        async with client(app_of(keys=(KEY,))) as http:
            headers = {"X-Request-Id": "r1", "traceparent": trace}
            await http.post("/v1/guard", json={"prompt": "Hello."}, headers={**headers, **BEARER})
            await http.request("BREW", "/nothing", headers=headers)
    lines = [record for record in caplog.records if record.getMessage() == "request"]
    names = ("request_id", "traceparent", "caller", "route", "method", "status")
    assert [tuple(getattr(line, name) for name in names) for line in lines] == [
        ("r1", trace, "key-1", "/v1/guard", "POST", 200),
        ("r1", trace, "anonymous", "other", "OTHER", 401),
    ]
    assert all(0 <= getattr(line, "seconds") < 60 for line in lines)  # noqa: B009


async def test_probes_and_the_pages_files_are_logged_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with client(app_of(keys=(KEY,)), KEY) as http:
            for path in ("/healthz", "/readyz", "/", "/page.js", "/v1/models"):
                await http.get(path)
    lines = [record for record in caplog.records if record.getMessage() == "request"]
    assert [line.levelname for line in lines] == ["DEBUG"] * 4 + ["INFO"]


async def test_what_is_served_counts_as_no_refusal() -> None:
    async with client(app_of(**HOSTS), KEY) as http:
        await http.post("/v1/guard", json={"prompt": "BAD"})
        await http.get("/healthz")
        assert await counts(http) == {}


async def test_bodies_that_arrive_have_a_bound_together() -> None:
    async def arriving(release: asyncio.Event) -> AsyncIterator[bytes]:
        yield body(900)[:-1]
        await release.wait()
        yield body(900)[-1:]

    limits = {"body_bytes": LIMIT, "all_bodies_bytes": 2_000}
    async with client(app_of(keys=(KEY,), limits=limits), KEY) as http:
        release = asyncio.Event()
        waiting = [asyncio.create_task(http.post("/v1/guard", content=arriving(release))) for _ in range(2)]
        await asyncio.sleep(0.05)
        refused = await http.post("/v1/guard", content=body(900))
        probe = await http.get("/readyz")
        release.set()
        answers = await asyncio.gather(*waiting)
        after = await http.post("/v1/guard", content=body(900))
        refusals = await counts(http)
        text = (await http.get("/metrics")).text
    assert refused.status_code == 503
    fault = refused.json()["error"]
    assert fault["code"] == "bodies_full"
    assert fault["message"] == "too many large requests are in flight: try again"
    assert [answer.status_code for answer in (*answers, after, probe)] == [200] * 4
    assert refusals == {"bodies_full": 1}
    assert 'guardreasoner_caller_refused_total{caller="key-1",reason="bodies_full"} 1.0' in text


async def test_the_last_byte_of_that_bound_is_let_in() -> None:
    async with client(app_of(limits={"body_bytes": LIMIT, "all_bodies_bytes": LIMIT})) as http:
        answer = await http.post("/v1/guard", content=body(LIMIT), headers={"content-type": "application/json"})
    assert answer.status_code == 200


class Clock:
    """Advances by 3 s with each piece of a body, and records the bounds on the time to wait for one."""

    def __init__(self) -> None:
        self.now = 100.0
        self.bounds: list[float] = []

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def timeout(self, seconds: float) -> asyncio.Timeout:
        self.bounds.append(seconds)
        return asyncio.timeout(None)


NDJSON = "application/x-ndjson; charset=utf-8"


@pytest.mark.parametrize(
    ("path", "content_type", "bounds"),
    [
        ("/v1/guard", "application/json", [30.0, 27.0, 24.0]),
        ("/v1/guard", NDJSON, [30.0, 27.0, 24.0]),
        ("/v1/guard/stream", "application/json", [30.0, 27.0, 24.0]),
        ("/v1/guard/stream", NDJSON, [30.0, 30.0, 30.0]),
    ],
)
async def test_a_body_has_its_seconds_as_a_whole_and_a_streamed_answer_for_each_piece(
    path: str, content_type: str, bounds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(access, "time", clock)
    monkeypatch.setattr(access, "asyncio", clock)
    pieces: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.request", "more_body": True},
        {"type": "http.request", "body": b"}"},
        {"type": "http.disconnect"},
    ]
    expected = list(pieces)
    received: list[Any] = []

    async def receive() -> Any:
        clock.now += 3
        return pieces.pop(0)

    async def app(_: Any, receive: Any, send: Any) -> None:
        received.extend([await receive() for _ in range(4)])

    async def send(_: Any) -> None: ...

    headers = [(b"host", b"localhost"), (b"content-type", content_type.encode())]
    await layer(app)({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)
    assert received == expected
    assert clock.bounds == bounds  # none on the wait for the disconnect message
