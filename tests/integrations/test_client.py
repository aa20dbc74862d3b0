"""The client returns a verdict in every case, whatever the server does."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardreasoner_vl.integrations import GuardClient
from guardreasoner_vl.types import Label, Verdict
from tests.integrations.service import CLOSED, GREEN, KEY, RED, Running, image_part
from tests.local_server import Handler, LocalServer

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = "canary-content"


class Odd(Handler):
    """Answers with the response that `odd` selects."""

    odd: Callable[[Odd], None]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).odd(self)


def both(client: GuardClient, **fields: Any) -> list[Verdict]:
    """The verdicts of the synchronous and the asynchronous client."""

    async def asked() -> Verdict:
        async with client:
            return await client.ajudge(**fields)

    return [client.judge(**fields), asyncio.run(asked())]


def of_odd(odd: Callable[[Any], None], timeout: float = 10.0, on_error: Any = "block") -> list[Verdict]:
    with LocalServer(type("This", (Odd,), {"odd": odd})) as server:
        return both(GuardClient(server.url, KEY, timeout, on_error=on_error), prompt=SECRET)


@pytest.mark.parametrize(
    ("fields", "action"),
    [
        ({"prompt": "Hello."}, "allow"),
        ({"prompt": "BAD"}, "block"),
        ({"prompt": "Hello.", "response": "BAD"}, "block"),
        ({"prompt": "BROKEN"}, "block"),
        ({"images": [GREEN]}, "allow"),
        ({"images": [RED]}, "block"),
        ({"messages": [{"role": "user", "content": [image_part(RED)]}]}, "block"),
        ({"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "BAD"}]}, "block"),
        ({"messages": []}, "block"),
        ({}, "block"),
        ({"prompt": "\ud800"}, "block"),
        ({"messages": [{"role": "user", "content": object()}]}, "block"),
        ({"images": [Path("/no/such/file")]}, "block"),
        ({"images": ["/etc/hostname"]}, "block"),
    ],
)
def test_judges(service: Running, fields: dict[str, Any], action: str) -> None:
    for verdict in both(GuardClient(service.url, KEY), **fields):
        assert verdict.action == action
        assert (verdict.error is None) == (action == "allow" or verdict.flagged is True)


def test_takes_bytes_files_and_data_urls(service: Running, tmp_path: Path) -> None:
    data = (Path(__file__).parents[2] / "examples/images").glob("*.*")
    path = sorted(data)[0]
    for verdict in both(GuardClient(service.url, KEY), images=[path, path.read_bytes(), GREEN]):
        assert verdict.action == "allow"
    assert [len(exchange.images) for exchange in service.backend.judged] == [3, 3]


def test_the_root_and_v1_are_both_its_address(service: Running) -> None:
    for url in (service.url, service.url + "/", service.url + "/v1", service.url + "/v1/"):
        with GuardClient(url, KEY) as client:
            assert client.judge("Hello.", mode="slow").action == "allow"


def test_an_unknown_guard_and_a_wrong_key_block(service: Running) -> None:
    for client in (GuardClient(service.url, KEY, guard="none"), GuardClient(service.url, on_error="allow")):
        for verdict in both(client, prompt="Hello."):
            assert (verdict.action, verdict.error and verdict.error.code) == ("block", "guard_refused")


@pytest.mark.slow
def test_one_client_serves_many_event_loops(service: Running) -> None:
    client = GuardClient(service.url, KEY)

    async def asked() -> str:
        verdicts = await asyncio.gather(*(client.ajudge("Hello.") for _ in range(4)))
        await client.aclose()
        return {verdict.action for verdict in verdicts}.pop()

    assert [asyncio.run(asked()) for _ in range(3)] == ["allow"] * 3


def unanswered(handler: Odd) -> None:
    handler.close_connection = True


def slow(handler: Odd) -> None:
    time.sleep(0.4)


@pytest.mark.parametrize(
    ("odd", "code"),
    [
        (lambda handler: handler.send(500, b"{}"), "guard_refused"),
        (lambda handler: handler.send(503, b"{}", {"Retry-After": "1"}), "guard_refused"),
        (lambda handler: handler.send(429, b"{}"), "guard_refused"),
        (lambda handler: handler.send(200, b""), "guard_malformed"),
        (lambda handler: handler.send(200, b"<html>"), "guard_malformed"),
        (lambda handler: handler.send(200, b'{"action": "allow"}'), "guard_malformed"),
        (lambda handler: handler.send(200, b"[]"), "guard_malformed"),
    ],
)
def test_a_failing_service_blocks_or_lets_pass_as_chosen(
    odd: Callable[[Any], None], code: str, caplog: pytest.LogCaptureFixture
) -> None:
    for verdict in of_odd(odd, timeout=0.2):
        assert (verdict.action, verdict.flagged, verdict.error and verdict.error.code) == ("block", None, code)
        assert re.search(": (check|see) ", verdict.error.message if verdict.error else "")  # the remedy
        assert (verdict.request.label, verdict.response.label) == (Label.ERROR, Label.ERROR)
    assert {record.levelno for record in caplog.records} == {logging.ERROR}
    caplog.clear()
    for verdict in of_odd(odd, timeout=0.2, on_error="allow"):
        assert (verdict.action, verdict.flagged, verdict.error and verdict.error.code) == ("allow", None, code)
    assert {record.levelno for record in caplog.records if record.name.startswith("guardreasoner")} == {
        logging.CRITICAL
    }
    assert SECRET not in caplog.text


def test_a_broken_connection_never_lets_pass() -> None:
    for verdict in of_odd(unanswered, on_error="allow"):
        assert (verdict.action, verdict.error and verdict.error.code) == ("block", "guard_hung_up")


def test_a_request_that_is_too_large_never_lets_pass(service: Running) -> None:
    for verdict in both(GuardClient(service.url, KEY, on_error="allow"), prompt="x" * 60_000_000):
        assert verdict.action == "block"
        assert verdict.error is not None
        assert verdict.error.code in ("guard_refused", "guard_hung_up")


def test_no_service_lets_pass_as_chosen() -> None:
    for on_error in ("block", "allow"):
        for verdict in both(GuardClient(CLOSED, on_error=on_error), prompt="Hello."):
            assert (verdict.action, verdict.error and verdict.error.code) == (on_error, "guard_unreachable")


@pytest.mark.parametrize("on_error", ["block", "allow"])
def test_an_answer_that_comes_too_late_never_lets_pass(on_error: str) -> None:
    """A long request takes long to judge, so lateness does not let it pass."""
    for verdict in of_odd(slow, timeout=0.2, on_error=on_error):
        assert (verdict.action, verdict.flagged, verdict.error and verdict.error.code) == (
            "block",
            None,
            "guard_timeout",
        )


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 413, 422])
def test_a_refusal_blocks_whatever_was_chosen(status: int) -> None:
    def refused(handler: Any) -> None:
        handler.send(status, b"{}", {"Location": "http://127.0.0.1:1/"})

    for verdict in of_odd(refused, on_error="allow"):
        assert (verdict.action, verdict.error and verdict.error.code) == ("block", "guard_refused")


def test_what_cannot_be_sent_blocks_whatever_was_chosen() -> None:
    for verdict in both(GuardClient(CLOSED, on_error="allow"), prompt="\ud800"):
        assert (verdict.action, verdict.error and verdict.error.code) == ("block", "guard_unasked")


async def test_cancelling_is_no_verdict() -> None:
    with LocalServer(type("This", (Odd,), {"odd": slow})) as server:
        async with GuardClient(server.url) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await client.ajudge("Hello.")


def test_the_environments_proxy_is_not_used(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", CLOSED)
    assert {verdict.action for verdict in both(GuardClient(service.url, KEY), prompt="Hello.")} == {"allow"}


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(body=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_no_body_but_a_verdict_allows(body: bytes) -> None:
    (verdict, again) = of_odd(lambda handler: handler.send(200, body))
    assert (verdict.action, again.action) == ("block", "block")
