"""A teacher behind any OpenAI-compatible server: GPT-4o as in the paper, or another model."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.engines.base import EngineRequest
from guardreasoner_vl.engines.openai.chat import chat_payload
from guardreasoner_vl.engines.openai.completion import read_completion
from guardreasoner_vl.engines.openai.http import HttpClient, HttpError, openai_key
from guardreasoner_vl.errors import EngineError, InputError, MissingExtraError
from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.teachers.base import TeacherAnswer, Tokens
from guardreasoner_vl.teachers.prompts import FORM, TASK, labelling_messages, writing_messages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiolimiter import AsyncLimiter

    from guardreasoner_vl.protocol import Message
    from guardreasoner_vl.types import CheckedImage, Sample

DEFAULT_MODEL = "gpt-4o-2024-08-06"
DEFAULT_URL = "https://api.openai.com/v1"

_PER_CLIENT = 32
"""Concurrent requests per HTTP client: for each request, httpx's work grows with the square of its connections."""

_BYTES_PER_TOKEN = 3
_TRUTH_BYTES = 600
_IMAGE_TOKENS = 1500
_FRAME_TOKENS = 16


@dataclass(frozen=True)
class Chat:
    """Builds the request bodies for a row, online and in batch files alike; `extra_body` overrides other fields."""

    model: str = DEFAULT_MODEL
    temperature: float = 1.0
    max_tokens: int = 1536
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def writing(self, sample: Sample, complaint: str | None = None) -> dict[str, Any]:
        """The request for reasoning. Raises `InputError` if an image cannot be sent."""
        exchange, images = checked_exchange(sample.exchange())
        return self._body(writing_messages(sample, exchange, complaint), images)

    def labelling(self, sample: Sample) -> dict[str, Any]:
        """The request for labels. Raises `InputError` if an image cannot be sent."""
        exchange, images = checked_exchange(sample.exchange())
        return self._body(labelling_messages(exchange), images)

    def estimate(self, sample: Sample) -> Tokens:
        """Upper estimate of the request's tokens, and the longest answer's tokens."""
        texts = (TASK, FORM, sample.prompt, sample.response or "")
        size = sum(len(text.encode("utf-8", "replace")) for text in texts) + _TRUTH_BYTES
        return Tokens(size // _BYTES_PER_TOKEN + _IMAGE_TOKENS * len(sample.images) + _FRAME_TOKENS, self.max_tokens)

    def _body(self, messages: tuple[Message, ...], images: tuple[CheckedImage, ...]) -> dict[str, Any]:
        content = chat_payload(EngineRequest(messages, images), "")
        sampling = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {"model": self.model, **content, **sampling, **self.extra_body}


class OpenAITeacher:
    """Asks over HTTP. `api_key` None reads OPENAI_API_KEY; `timeout` is in seconds per answer, retries included.

    A request waits until the limits per minute allow it; bursts of one second's worth are allowed. Raises
    `MissingExtraError` if a limit is set and aiolimiter is not installed.
    """

    def __init__(
        self,
        chat: Chat | None = None,
        *,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        max_concurrency: int = 1024,
        timeout: float = 180.0,
        retries: int = 5,
    ) -> None:
        key = openai_key(api_key)

        def client(concurrency: int) -> HttpClient:
            return HttpClient(base_url, key, max_concurrency=concurrency, timeout=timeout, retries=retries)

        self._chat = chat or Chat()
        self._clients = partial(_Clients, client, max_concurrency)
        self._per_minute = (requests_per_minute, tokens_per_minute)
        self._open()

    @property
    def name(self) -> str:
        """The model's name at the server."""
        return self._chat.model

    @property
    def chat(self) -> Chat:
        """The builder of the request bodies."""
        return self._chat

    def estimate(self, sample: Sample) -> Tokens:
        """See `Chat.estimate`."""
        return self._chat.estimate(sample)

    async def write(self, sample: Sample, complaint: str | None) -> TeacherAnswer:
        """Ask for reasoning. Raises `GuardError`."""
        if sample.images:
            return await self._ask(sample, await asyncio.to_thread(self._chat.writing, sample, complaint))
        return await self._ask(sample, self._chat.writing(sample, complaint))

    async def label(self, sample: Sample) -> TeacherAnswer:
        """Ask for labels. Raises `GuardError`."""
        if sample.images:
            return await self._ask(sample, await asyncio.to_thread(self._chat.labelling, sample))
        return await self._ask(sample, self._chat.labelling(sample))

    async def aclose(self) -> None:
        """Close the connections; later requests open new ones."""
        http = self._http
        self._open()
        await http.aclose()

    def _open(self) -> None:
        self._http = self._clients()
        requests, tokens = self._per_minute
        self._requests = None if requests is None else _Limit(requests, "requests_per_minute")
        self._tokens = None if tokens is None else _Limit(tokens, "tokens_per_minute")

    async def _ask(self, sample: Sample, body: dict[str, Any]) -> TeacherAnswer:
        if self._requests:
            await self._requests.take(1)
        if self._tokens:
            await self._tokens.take(self._chat.estimate(sample).total)
        return read_teacher_answer(await self._http.post(body))


def read_teacher_answer(body: bytes) -> TeacherAnswer:
    """Read a response of `/chat/completions`. Raises `HttpError` with the code `malformed`."""
    try:
        completion = read_completion(body)
    except EngineError as error:
        raise HttpError(str(error), "malformed") from error
    used = completion.used(0.0)
    text = completion.text or _refusal_text(body)
    return TeacherAnswer(text, completion.finish_reason or "none", used.prompt_tokens, used.completion_tokens)


def _refusal_text(body: bytes) -> str:
    """The text of OpenAI's separate `refusal` field, empty if there is none."""
    refusal = json.loads(body)["choices"][0]["message"].get("refusal")
    return refusal if isinstance(refusal, str) else ""


class _Clients:
    """A growing pool of HTTP clients with at most `_PER_CLIENT` concurrent requests each, `most` in total."""

    def __init__(self, client: Callable[[int], HttpClient], most: int) -> None:
        self._client, self._most = client, most
        self._clients = [client(min(_PER_CLIENT, most))]
        self._busy = [0]

    async def post(self, body: dict[str, Any]) -> bytes:
        """Send `body` and return the response's body. Raises `GuardError`."""
        number = self._free()
        self._busy[number] += 1
        try:
            return await self._clients[number].post("chat/completions", lambda: body)
        finally:
            self._busy[number] -= 1

    async def aclose(self) -> None:
        """Close all clients."""
        for client in self._clients:
            await client.aclose()

    def _free(self) -> int:
        """The first client with capacity; if none has, a new client, or at the limit the least busy one."""
        free = next((number for number, busy in enumerate(self._busy) if busy < _PER_CLIENT), None)
        if free is not None:
            return free
        remaining = self._most - _PER_CLIENT * len(self._clients)
        if remaining <= 0:
            return min(range(len(self._busy)), key=self._busy.__getitem__)
        self._clients.append(self._client(min(_PER_CLIENT, remaining)))
        self._busy.append(0)
        return len(self._busy) - 1


class _Limit:
    """A rate limit per minute: a leaky bucket that holds one second's worth."""

    def __init__(self, per_minute: float, name: str) -> None:
        if not per_minute > 0:
            raise InputError(
                f"{name} is {per_minute:g}, but must be more than 0: give a larger number, or None for no limit"
            )
        size = max(1.0, per_minute / 60)
        self._bucket: AsyncLimiter = _limiter()(size, size * 60 / per_minute)

    async def take(self, amount: float) -> None:
        """Wait until `amount` is allowed; larger amounts than the bucket are taken in pieces."""
        while amount > 0:
            piece = min(amount, self._bucket.max_rate)
            await self._bucket.acquire(piece)
            amount -= piece


def _limiter() -> type[AsyncLimiter]:
    try:
        from aiolimiter import AsyncLimiter
    except ImportError as error:
        raise MissingExtraError("aiolimiter", "teacher") from error
    return AsyncLimiter
