"""The service as a separate process, for benchmarks."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@dataclass
class Server:
    """`guardreasoner-vl serve` in a separate process."""

    url: str
    process: subprocess.Popen[bytes]

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text("ascii")
        return max(map(int, children.split()))

    def memory(self) -> tuple[int, int]:
        """Resident MB of the service and of its engine; 0 while one is being replaced."""
        return _resident(self.process.pid), _resident(self.engine_pid())


def _resident(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) // 1024
    return 0


@asynccontextmanager
async def running(**environment: str) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from guardreasoner_vl.cli.app import main; main()", "serve", "--port", str(port)]
    settings = {
        **os.environ,
        "GUARDREASONER_LOG_LEVEL": "CRITICAL",
        "GUARDREASONER_LIMITS__QUEUE": "512",
        **environment,
    }
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=settings)
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            while not await is_ready(server, session):
                await asyncio.sleep(0.2)
            yield server, session
    finally:
        process.terminate()
        await asyncio.sleep(0.3)
        process.terminate()  # it leaves at once and does not wait until callers have heard
        process.wait()


async def is_ready(server: Server, session: aiohttp.ClientSession) -> bool:
    with suppress(aiohttp.ClientError):
        async with session.get(f"{server.url}/readyz") as answer:
            return answer.status == 200
    return False


async def judged(server: Server, session: aiohttp.ClientSession, row: dict[str, str]) -> dict[str, Any]:
    async with session.post(f"{server.url}/v1/guard", json=row) as answer:
        answer.raise_for_status()
        verdict: dict[str, Any] = await answer.json()
        return verdict
