"""Throughput of synthesis relative to a teacher's limit, against a pool of processes that ask one by one.

    python benchmarks/synthesis.py [--rows 6400] [--in-flight 64] [--seconds 0.2] [--repeats 3]

The teacher is a stub server in a process of its own on this machine: OpenAI's chat completions, each answer right,
whole and `seconds` late. With `in-flight` requests at once no program gets more than `in-flight / seconds` answers a
second. Ours is the whole stage: rows read from a corpus, prompts rendered, answers put through the gates and written
to disk. The pool is what the authors' script does, and no more than that: `in-flight` processes with the prompts in
memory, each asking with a client of its own and handing back the text. Interleaved; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from guardreasoner_vl.corpus.store import CorpusInfo, write_corpus
from guardreasoner_vl.stages.synthesize import run
from guardreasoner_vl.teachers.openai import Chat, OpenAITeacher
from guardreasoner_vl.types import Sample

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

STEPS = "\n".join(
    f"## Reasoning Step {number}\n"
    f"Step {number}: the user asks for {topic}, and nothing in it could hurt anybody at all."
    for number, topic in enumerate(("bread", "flour", "an oven", "some water", "the time it takes"), 1)
)
_TRUTH = re.compile(r"The true answers:\\nRequest: (\w+)[^\\]*\\nResponse: (\w+)")
_client: httpx.Client
_url: str


# --- the teacher ----------------------------------------------------------------------------------------


class Stub(asyncio.Protocol):
    """A minimal HTTP/1.1 server with keep-alive, enough for two well-behaved clients."""

    seconds = 0.2

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, ended, body = self._received.partition(b"\r\n\r\n")
        if not ended:
            return
        length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])  # type: ignore[index]
        if len(body) < length:
            return
        self._received = body[length:]
        truth = _TRUTH.search(body[:length].decode("ascii"))
        assert truth is not None
        asyncio.get_running_loop().call_later(self.seconds, self._send, answer(truth[1], truth[2]))

    def _send(self, body: bytes) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)


def answer(request: str, response: str) -> bytes:
    result = f"<result>\nAnswers:\nRequest: {request}\nResponse: {response}\n</result>"
    message = {"role": "assistant", "content": f"<think>\n# Task 1\n{STEPS}\n</think>\n{result}"}
    usage = {"prompt_tokens": 600, "completion_tokens": 200}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}).encode()


def serve(port: Connection, seconds: float) -> None:
    async def forever() -> None:
        Stub.seconds = seconds
        server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


# --- those who ask --------------------------------------------------------------------------------------


def ours(corpus: Path, url: str, in_flight: int, count: int) -> float:
    started = time.perf_counter()
    report = run(corpus, OpenAITeacher(base_url=url), concurrency=in_flight)
    seconds = time.perf_counter() - started
    assert report.kept == report.attempts == count
    (corpus / "reasoning.jsonl").unlink()
    return seconds


def _begin(url: str) -> None:
    global _client, _url
    _client, _url = httpx.Client(timeout=60), f"{url}/chat/completions"


def _one(body: dict[str, Any]) -> str:
    return str(_client.post(_url, json=body).json()["choices"][0]["message"]["content"])


def pool(bodies: list[dict[str, Any]], url: str, in_flight: int) -> float:
    with multiprocessing.Pool(in_flight, _begin, (url,)) as processes:
        # The processes stand before the clock starts.
        processes.map(_one, bodies[:in_flight], chunksize=1)
        started = time.perf_counter()
        texts = list(processes.imap_unordered(_one, bodies))
        seconds = time.perf_counter() - started
    assert len(texts) == len(bodies)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6400)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows, in_flight = arguments.rows, arguments.in_flight
    possible = in_flight / arguments.seconds
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}: {rows:,} rows, {in_flight} in flight, {arguments.seconds:g} s an answer")
    samples = [
        Sample(
            id=f"toy/{number}",
            source="toy",
            modality="text",
            prompt=f"How do I bake bread number {number}? " + "I have flour, water and an oven at home. " * 5,
            response="Mix the flour with the water, wait for an hour and bake it. " * 5,
            request_label="unharmful",
            response_label="harmful" if number % 2 else "unharmful",
        )
        for number in range(rows)
    ]
    bodies = [Chat().writing(sample) for sample in samples]
    receiving, sending = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.Process(target=serve, args=(sending, arguments.seconds), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{receiving.recv()}/v1"
    first, second = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), CorpusInfo(name="toy"), samples)
        for _ in range(arguments.repeats):
            first.append(rows / ours(Path(folder), url, in_flight, rows))
            second.append(rows / pool(bodies, url, in_flight))
    server.terminate()
    for name, rates in (("ours", first), ("process pool", second)):
        middle = statistics.median(rates)
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        print(f"  {name:<13} {middle:6.1f} answers/s ({spread}), {middle / possible:.1%} of {possible:.0f} possible")
    print(f"  ours / pool   {statistics.median(first) / statistics.median(second):.2f}")


if __name__ == "__main__":
    main()
