"""A local image server with scripted answers, optionally with TLS."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Answer: TypeAlias = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]

HOST = "pics.example"  # never resolves, so that only a pinned address reaches the server
LOOPBACK = "127.0.0.1"
SECRET = "canary-path"
SECRET_PATH = f"/{SECRET}?token={SECRET}"


def head(status: int, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} Word", *lines, "", ""]).encode("latin-1")


def moved(location: str, status: int = 302) -> bytes:
    return head(status, f"Location: {location}", "Content-Length: 0")


@dataclass
class Site:
    """A local server; `answer` writes the response to one request."""

    answer: Answer
    port: int = 0
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(request)
                await self.answer(request, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    def url(self, path: str = SECRET_PATH, host: str = HOST, scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


def sending(answer: bytes | dict[str, bytes]) -> Answer:
    async def send(request: bytes, writer: asyncio.StreamWriter) -> None:
        path = request.split()[1].decode().partition("?")[0]
        writer.write(answer if isinstance(answer, bytes) else answer.get(path, head(404, "Content-Length: 0")))

    return send


@asynccontextmanager
async def serving(
    answer: bytes | dict[str, bytes] | Answer, tls: ssl.SSLContext | None = None, host: str = LOOPBACK, port: int = 0
) -> AsyncIterator[Site]:
    """Start a site; `answer` is the response to each request, or one for each path, or a function that sends it."""
    site = Site(answer if callable(answer) else sending(answer))
    server = await asyncio.start_server(site.serve, host, port, ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(others, timeout=1) if others else None


class Authority:
    """A certificate for one name: `server` presents it, `client` trusts it; `greeted` lists the names asked for."""

    def __init__(self, path: Path, name: str) -> None:
        _write_certificate(path, name)
        self.path = path
        self.greeted: list[str | None] = []
        self.client = ssl.create_default_context(cafile=str(path))
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.load_cert_chain(path)
        self.server.sni_callback = lambda _, name, __: self.greeted.append(name)


def _write_certificate(path: Path, name: str) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
