"""`batch --url`: a guard that calls a running service."""

from __future__ import annotations

import base64
import json
import socket
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image

from guardreasoner_vl.batch.moderate import run_batch
from guardreasoner_vl.engines.openai import http as openai_http
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.remote.served import ServedGuard, messages_with_images
from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import ServiceConfig
from guardreasoner_vl.types import Exchange, Turn
from tests.made_images import image
from tests.service.running import running
from tests.service.scripted_backend import ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

KEY = "a-key-of-some-length"


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(pause=0.01)


@pytest.fixture
def url(backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("GUARDREASONER_KEY", KEY)
    settings: dict[str, Any] = {"keys": (KEY,), "limits": {"queue": 4, "retry_after": 1}}
    app = create_app(ServiceConfig(**settings), {"default": backend})
    with running(app) as address:
        yield address


def test_a_file_is_judged_by_the_service(url: str, backend: ScriptedBackend, tmp_path: Path) -> None:
    rows = [{"id": number, "prompt": "BAD" if number % 3 == 0 else f"Loaf {number}?"} for number in range(12)]
    rows.append({"id": 12, "prompt": "Look.", "images": ["/nowhere.png"]})
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with ServedGuard(url, "slow", max_concurrency=4) as guard:
        assert guard.model.name == "scripted"
        summary = run_batch(guard, source, tmp_path / "out.jsonl")
    saved = {row["id"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text("utf-8").splitlines())}
    assert [saved[number]["action"] for number in range(12)] == ["block" if n % 3 == 0 else "allow" for n in range(12)]
    assert saved[12]["error"]["code"] == "invalid_image"
    assert not summary.complete
    asked = len(backend.judged)
    with ServedGuard(url, "slow", max_concurrency=4) as guard:
        run_batch(guard, source, tmp_path / "out.jsonl")
    assert len(backend.judged) == asked + 1  # the one that says hello


def test_a_conversation_arrives_as_it_was(url: str, backend: ScriptedBackend) -> None:
    shown = image(56, 56)
    exchange = Exchange("And now?", (shown,), "Bake.", (Turn("How?", (shown,), "Mix."), Turn("Why?", (), "So.")))
    with ServedGuard(url, "slow") as guard:
        (verdict,) = guard.moderate_batch([exchange])
    assert verdict.action == "allow"
    judged = backend.judged[-1]
    assert (judged.prompt, judged.response, len(judged.images)) == ("And now?", "Bake.", 1)
    assert [(turn.prompt, turn.response, len(turn.images)) for turn in judged.history] == [
        ("How?", "Mix.", 1),
        ("Why?", "So.", 0),
    ]
    assert Exchange.from_messages(messages_with_images(Exchange(response="Alone."))) == Exchange(response="Alone.")


def test_an_image_file_is_sent_as_it_is(tmp_path: Path) -> None:
    """Checked here and sent as PNG, a photo may be larger than the service takes."""
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (56, 56), "green").save(path)
    [message] = messages_with_images(Exchange(images=(path, path.read_bytes())))
    urls = [part["image_url"]["url"] for part in message["content"]]
    assert [base64.b64decode(url.partition(",")[2]) for url in urls] == [path.read_bytes()] * 2


def test_a_wrong_key_and_a_wrong_address_are_errors_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDREASONER_KEY", "another-key-of-some-length")
    with pytest.raises(EngineError, match="set GUARDREASONER_KEY"):
        ServedGuard(url, "slow")
    attempts = counted_attempts(monkeypatch)
    with pytest.raises(EngineError, match="check the address and that the server runs"):
        ServedGuard(closed_address(), "slow")
    assert attempts == ["guard"]


def test_a_busy_service_and_a_broken_connection_are_asked_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = counted_attempts(monkeypatch, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS)
    with ServedGuard(url, "slow") as guard:
        assert attempts == ["guard"] * 3
        attempts = counted_attempts(monkeypatch, None)
        (verdict,) = guard.moderate_batch([Exchange("Bake?")])
    assert (verdict.action, len(attempts)) == ("allow", 2)


def closed_address() -> str:
    """An address that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


def counted_attempts(monkeypatch: pytest.MonkeyPatch, *faults: HTTPStatus | None) -> list[str]:
    """The paths of the requests from here on; the first ones end in `faults`: None is a lost connection. No pauses."""
    stream = httpx.AsyncClient.stream
    attempts: list[str] = []

    @asynccontextmanager
    async def counted(client: httpx.AsyncClient, method: str, path: str, **how: Any) -> AsyncIterator[httpx.Response]:
        attempts.append(path)
        fault = faults[len(attempts) - 1] if len(attempts) <= len(faults) else HTTPStatus.OK
        if fault is None:
            raise httpx.ReadError("lost")
        if fault != HTTPStatus.OK:
            yield httpx.Response(fault)
            return
        async with stream(client, method, path, **how) as response:
            yield response

    monkeypatch.setattr(openai_http, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(httpx.AsyncClient, "stream", counted)
    return attempts
