"""The real command with the embedded guard: killed engines, disconnecting clients, shutdown."""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import ServiceConfig
from guardreasoner_vl.service.server import announce, bound_sockets, reload_keys
from guardreasoner_vl.types import Verdict
from tests.service.scripted_backend import ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
START_SECONDS = 120
IN_FLIGHT = 'guardreasoner_in_flight{guard="default"}'
COMMAND = [sys.executable, "-c", "from guardreasoner_vl.cli.app import main; main()", "serve"]


class Service:
    """The running command; `log` is its stderr."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url, self.process, self.log = url, process, log
        self.client = httpx.Client(base_url=url, timeout=60)  # one for all: it takes 25 ms to make

    def judge(self, prompt: str, **body: Any) -> httpx.Response:
        return self.client.post("/v1/guard", json={"prompt": prompt, **body})

    def wait_for_in_flight(self, count: int) -> None:
        """Wait until that many exchanges are in flight."""
        for _ in range(1000):
            if f"{IN_FLIGHT} {count}.0" in self.client.get("/metrics").text:
                return
            time.sleep(0.005)
        raise AssertionError(f"never {count} in flight")

    def engine_pid(self) -> int:
        """The id of the youngest child process: the engine."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text("ascii")
        return max(map(int, children.split()))

    def wait_until_ready(self) -> None:
        for _ in range(10 * START_SECONDS):
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/readyz", timeout=30).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError("the service did not become ready")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def service(folder: Path, *options: str, **variables: str) -> Iterator[Service]:
    port = free_port()
    command = [*COMMAND, "--port", str(port), *options]
    environment = {**os.environ, "GUARDREASONER_UPSTREAM__WINDOW": "20", **variables}
    log = folder / "log.jsonl"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        running_service = Service(f"http://127.0.0.1:{port}", process, log)
        try:
            running_service.wait_until_ready()
            yield running_service
        finally:
            running_service.client.close()
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("service")) as running_service:
        yield running_service


def test_concurrent_exchanges(running: Service) -> None:
    prompts = [f"How do I bake {number} loaves of bread?" for number in range(24)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(running.judge, prompts))
    assert {answer.status_code for answer in answers} == {200}
    verdicts = [Verdict.model_validate(answer.json()) for answer in answers]
    assert all(verdict.error is None and verdict.model.name == "embedded" for verdict in verdicts)
    alone = [Verdict.model_validate(running.judge(prompt).json()) for prompt in prompts[:4]]
    assert [one.request.label for one in alone] == [one.request.label for one in verdicts[:4]]


def test_a_client_that_leaves_is_forgotten(running: Service) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/v1/guard", json={"prompt": "Tell me about bread. " * 40}, timeout=0.05)
    assert running.judge("Hello.").status_code == 200
    for _ in range(50):
        shown = httpx.get(f"{running.url}/metrics").text
        if f"{IN_FLIGHT} 0.0" in shown:
            break
        time.sleep(0.1)
    assert f"{IN_FLIGHT} 0.0" in shown


def test_an_answer_that_grows_is_released_while_it_is_sent(running: Service) -> None:
    """Full duplex: the first release arrives before the last line is sent."""
    host, port = running.url.removeprefix("http://").split(":")

    def chunk(row: dict[str, str]) -> bytes:
        line = json.dumps(row).encode() + b"\n"
        return f"{len(line):x}\r\n".encode() + line + b"\r\n"

    head = (
        f"POST /v1/guard/stream HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/x-ndjson\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + chunk({"prompt": "How do I bake bread?"}))
        connection.sendall(chunk({"delta": "Mix flour and water. "}))
        seen = until(connection, b"event: release")
        connection.sendall(chunk({"delta": "Then bake it."}) + b"0\r\n\r\n")
        seen += until(connection, b"\r\n0\r\n\r\n")
    assert seen.count(b"event: release") == 2
    assert b"event: verdict" in seen


def until(connection: socket.socket, mark: bytes) -> bytes:
    """The received text up to and including the mark."""
    seen = b""
    while mark not in seen:
        piece = connection.recv(65536)
        assert piece, seen
        seen += piece
    return seen


def test_a_killed_engine_answers_with_errors_and_restarts(running: Service) -> None:
    prompts = [f"Tell me about loaf {number}. " * 20 for number in range(16)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(running.judge, prompt) for prompt in prompts]
        running.wait_for_in_flight(16)
        os.kill(running.engine_pid(), signal.SIGKILL)
        answers = [future.result() for future in waiting]
    for answer in answers:
        assert answer.status_code in (200, 503)  # judged, lost with the engine, or not accepted
        if answer.status_code == 200 and answer.json()["error"]:
            assert (answer.json()["error"]["code"], answer.json()["action"]) == ("engine_gone", "block")
    assert any(answer.status_code == 200 and answer.json()["error"] for answer in answers)
    running.wait_until_ready()
    assert running.judge("Hello.").json()["error"] is None
    assert "guardreasoner_engine_restarts_total 1.0" in httpx.get(f"{running.url}/metrics").text


def test_the_log_is_json_without_content(running: Service) -> None:
    for number in range(12):  # its own lines: the other tests may have run on another worker
        running.judge(f"canary-7f3a {number}")
    lines = running.log.read_text("utf-8").splitlines()
    assert len(lines) > 10
    rows = [json.loads(line) for line in lines]
    assert any(row["message"] == "request" and row["route"] == "/v1/guard" for row in rows)
    assert "canary-7f3a" not in "".join(lines)


def test_sigterm_loses_nothing_that_was_accepted(tmp_path: Path) -> None:
    leaving = {"GUARDREASONER_LIMITS__LEAVE_SECONDS": "2"}
    with service(tmp_path, **leaving) as running_service, concurrent.futures.ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(running_service.judge, f"Tell me about loaf {number}. " * 20) for number in range(16)]
        running_service.wait_for_in_flight(16)
        running_service.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        probe = httpx.get(f"{running_service.url}/readyz")
        assert (probe.status_code, probe.json()["status"]) == (503, "leaving")
        assert running_service.judge("Hello.").status_code == 200  # a new connection of who has not heard of it yet
        answers = [future.result() for future in waiting]
        assert [answer.status_code for answer in answers] == [200] * 16
        assert all(answer.json()["error"] is None for answer in answers)
        assert running_service.process.wait(30) == -signal.SIGTERM  # uvicorn ends as the signal would have


def test_a_second_signal_ends_the_wait(tmp_path: Path) -> None:
    with service(tmp_path, GUARDREASONER_LIMITS__LEAVE_SECONDS="600") as running:
        for _ in range(2):
            running.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert running.process.wait(30) == -signal.SIGTERM


def test_sighup_reads_the_keys_anew_and_never_kills(tmp_path: Path) -> None:
    old, new = "the-old-key-of-the-shop", "the-new-key-of-the-shop"
    settings = tmp_path / "service.yaml"
    settings.write_text(f"keys: [{{name: shop, key: {old}}}]\n")

    def statuses(running: Service) -> list[int]:
        answers = [
            httpx.get(f"{running.url}/v1/models", headers={"Authorization": f"Bearer {key}"}) for key in (old, new)
        ]
        return [answer.status_code for answer in answers]

    def become(running: Service, expected: list[int]) -> None:
        until_time = time.monotonic() + 10
        while statuses(running) != expected and time.monotonic() < until_time:
            time.sleep(0.05)
        assert statuses(running) == expected

    with service(tmp_path, "--config", str(settings)) as running:
        assert statuses(running) == [200, 401]
        settings.write_text(f"keys: [{{name: shop, key: {new}}}]\n")
        running.process.send_signal(signal.SIGHUP)
        become(running, [401, 200])
        settings.write_text("keys: [{name: shop}]\n")
        running.process.send_signal(signal.SIGHUP)
        while "the old keys stay" not in running.log.read_text("utf-8"):
            assert running.process.poll() is None
            time.sleep(0.05)
        assert statuses(running) == [401, 200]
        log = running.log.read_text("utf-8")
        assert old not in log
        assert new not in log


def test_a_configuration_without_keys_opens_no_service_that_has_some(caplog: pytest.LogCaptureFixture) -> None:
    """An editor may empty a file before writing it."""
    app = create_app(
        ServiceConfig.model_validate({"keys": ["a-key-of-some-length"], "host": "0.0.0.0"}),
        {"default": ScriptedBackend()},
    )
    reload_keys(app, ServiceConfig)
    assert app.state.callers.named(b"a-key-of-some-length") == "key-1"
    assert app.state.callers.needs_key
    assert "the old keys stay" in caplog.text


def test_a_name_is_served_at_all_its_addresses() -> None:
    families = {family for family, *_ in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    sockets = bound_sockets("localhost", 0)
    try:
        assert {listening.family for listening in sockets} <= families
        assert socket.AF_INET in {listening.family for listening in sockets}
        port = sockets[0].getsockname()[1]
        assert {listening.getsockname()[1] for listening in sockets} == {port}
        for listening in sockets:
            listening.listen()
        with pytest.raises(EngineError, match="choose another address or port") as caught:
            bound_sockets("localhost", port)
        assert "\n" not in str(caught.value)
    finally:
        for listening in sockets:
            listening.close()
    with pytest.raises(EngineError, match="choose another address or port"):
        bound_sockets("no such name", 0)


def test_the_start_is_logged_in_one_plain_line(running: Service) -> None:
    messages = [json.loads(line)["message"] for line in running.log.read_text("utf-8").splitlines()]
    assert f"serving on {running.url}; guards: default: embedded (slow)" in messages
    assert not any("<str>" in message for message in messages)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_address_as_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    announce("http://127.0.0.1:8800", ServiceConfig())
    assert terminal.getvalue() == "serving on http://127.0.0.1:8800; guards: default: embedded (slow)\n"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def test_a_failed_start_is_reported_in_one_line(tmp_path: Path) -> None:
    public = command("--host", "0.0.0.0")
    assert (public.returncode, public.stderr.count("\n")) == (2, 1)
    assert "needs keys" in public.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = command("--port", str(taken.getsockname()[1]), "--model", str(tmp_path / "nowhere"))
    assert (busy.returncode, busy.stderr.count("\n")) == (2, 1)
    assert "choose another" in busy.stderr  # and not a word of the model, which is looked for later
    missing = command("--model", str(tmp_path), "--port", str(free_port()))
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1].startswith("error: ")


def test_the_resolved_settings_are_printed_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "port: 9000\nlimits: {queue: 5, max_batch_size: 3}\nupstream: {api_key: file-secret}\n"
    )
    shown = command(
        "--config",
        str(tmp_path / "c.yaml"),
        "--print-config",
        "--mode",
        "fast",
        GUARDREASONER_KEYS="a-key-of-some-length,another-key-of-some-length",
        GUARDREASONER_LIMITS__QUEUE="7",
    )
    assert shown.returncode == 0, shown.stderr
    assert "port: 9000" in shown.stdout
    assert "queue: 7" in shown.stdout
    assert "max_batch_size: 3" in shown.stdout
    assert "mode: fast" in shown.stdout
    assert "secret" not in shown.stdout
    assert "a-key-of" not in shown.stdout
