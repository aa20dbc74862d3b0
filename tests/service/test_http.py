"""A request head that does not end: the connection is closed, and others are served."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
import uvicorn

from guardreasoner_vl.service.http import HEAD_BYTES, bounded

if TYPE_CHECKING:
    from collections.abc import Iterator


async def echo(scope: dict[str, object], receive: object, send: object) -> None:
    size, more = 0, True
    while more:
        message = await receive()  # type: ignore[operator]
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": str(size).encode()})  # type: ignore[operator]


@contextmanager
def running(head_seconds: float) -> Iterator[tuple[str, int]]:
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(echo, log_config=None, lifespan="off", ws="none", http=bounded(head_seconds))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def closed_after(connection: socket.socket) -> float:
    """Seconds until the server closes the connection."""
    connection.settimeout(10)
    started = time.monotonic()
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - started


def endless(connection: socket.socket, piece: bytes) -> None:
    for _ in range(200):
        connection.sendall(piece)
        time.sleep(0.01)


@pytest.mark.slow
def test_a_head_that_never_comes_or_drips_is_given_up() -> None:
    with running(head_seconds=0.3) as address:
        with socket.create_connection(address) as silent, socket.create_connection(address) as dripping:
            dripping.sendall(b"POST / HTTP/1.1\r\n")
            assert closed_after(silent) < 5
            assert closed_after(dripping) < 5
        with socket.create_connection(address) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" in connection.recv(4096)
            connection.sendall(b"GET / HT")
            assert closed_after(connection) < 5


@pytest.mark.parametrize("piece", [b"X-More: 1\r\n", b"x"])
def test_an_endless_head_is_cut_off(piece: bytes) -> None:
    with running(head_seconds=30) as address:
        with socket.create_connection(address) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nX-Long: ")
            with pytest.raises(ConnectionError):
                endless(connection, piece * (HEAD_BYTES // len(piece) // 8))
        assert httpx.get("http://{}:{}".format(*address), timeout=5).status_code == 200


@pytest.mark.slow
def test_large_bodies_and_slow_answers_are_no_heads() -> None:
    with running(head_seconds=0.5) as address, httpx.Client(base_url="http://{}:{}".format(*address)) as http:
        for _ in range(3):  # one connection, kept
            assert http.post("/", content=b"x" * (4 * HEAD_BYTES)).text == str(4 * HEAD_BYTES)

        def slowly() -> Iterator[bytes]:
            for _ in range(4):
                yield b"x"
                time.sleep(0.25)

        assert http.post("/", content=slowly()).text == "4"
