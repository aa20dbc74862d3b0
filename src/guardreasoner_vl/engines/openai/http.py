"""An HTTP client for OpenAI-compatible servers with a deadline, retries and limited concurrency, on its own event loop.

An HTTP client belongs to one event loop; callers may use any loop or none. All requests therefore run on one loop in a
thread: synchronous code blocks on it, and coroutines of any loop await it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import threading
import time
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import httpx

from guardreasoner_vl.errors import EngineError, GuardError, InputTooLongError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
    from concurrent.futures import Future

    Payload: TypeAlias = Callable[[], Mapping[str, Any]]

T = TypeVar("T")

BACKOFF_SECONDS = 0.5
_POOL = 8
"""Connections of one httpx client, which looks at all pairs of them at each request: 20 ms for 128 connections."""
_RETRIED = frozenset({429, 500, 502, 503, 504})
_TOO_LONG = re.compile(
    r"(maximum|model's) (context|model) length|\(context length|max_model_len|context_length_exceeded|input_too_long"
)


REFUSED = "refused"
"""The error code where the server does not take this request or withholds the answer: its author may have caused it."""


class HttpError(EngineError):
    """A request that got no usable answer; `status` is the HTTP status, None if there was none."""

    def __init__(self, message: str, code: str = EngineError.code, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class LoopThread:
    """An event loop in a daemon thread, which the first `submit` starts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.closed = False

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `work` on the loop; cancelling the future cancels it. Raises `EngineError` after `close`."""
        with self._lock:
            if self.closed:
                work.close()
                raise EngineError("the engine is closed: open a new one")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="openai-engine", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run_all(self, works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """Submit all and wait for all results; an interrupt or an error cancels the others."""
        futures = [self.submit(work) for work in works]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel running tasks, run `last`, and end the thread."""
        with self._lock:
            self.closed = True
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        for step in (_cancel_others, last, loop.shutdown_asyncgens, _cancel_others):
            asyncio.run_coroutine_threadsafe(step(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class HttpClient:
    """GET and POST of JSON. All methods except the constructor must be called on one event loop.

    At most `max_concurrency` requests run at once; each has `timeout` seconds, retries included, time in the queue
    excluded.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        max_concurrency: int = 32,
        timeout: float = 120.0,
        retries: int = 3,
    ) -> None:
        self._url = _checked_url(base_url)
        self._headers = {"Authorization": f"Bearer {_checked_key(api_key)}"} if api_key else {}
        self._timeout = timeout
        self._retries = retries
        self._places: asyncio.LifoQueue[int] = asyncio.LifoQueue()  # for each free place, the number of its pool
        for place in reversed(range(max_concurrency)):
            self._places.put_nowait(place // _POOL)
        self._pools: dict[int, httpx.AsyncClient] = {}
        self._closing = False

    @property
    def server(self) -> str:
        """Scheme, host and port of the address, without a password."""
        return f"{self._url.scheme}://{self._url.netloc.decode('ascii')}"

    @property
    def root(self) -> str:
        """The address without /v1, below which a server has paths of its own. It may hold a password: never show it."""
        return str(self._url).removesuffix("/").removesuffix("/v1")

    async def get(self, path: str) -> bytes:
        """GET `path` and return the answer's body. Raises `HttpError` or `InputTooLongError`."""
        return await self._within_deadline("GET", path, None, _whole_body)

    async def post(self, path: str, payload: Payload, *, reconnect: bool = True) -> bytes:
        """POST `payload` as JSON and return the answer's body. Raises `HttpError` or `InputTooLongError`.

        `payload` is called when the request is sent, so that a long queue holds no inlined images. Without `reconnect`
        a server that cannot be reached is an error at once, while a busy one is still retried.
        """
        return await self._within_deadline("POST", path, payload, _whole_body, reconnect)

    async def post_streamed(self, path: str, payload: Payload, read: Callable[[httpx.Response], Awaitable[T]]) -> T:
        """POST `payload` and return the result of `read`, which gets the response before its body is read.

        The response may have any content type. `read` is called again if the connection breaks and the request is
        retried. Raises what `post` and `read` raise.
        """
        return await self._within_deadline("POST", path, payload, read)

    def stop(self) -> None:
        """Report later cancellations as errors: after this call the engine cancels requests, not their callers."""
        self._closing = True

    async def aclose(self) -> None:
        """Close the connections."""
        for pool in self._pools.values():
            await pool.aclose()

    async def _within_deadline(
        self,
        method: str,
        path: str,
        payload: Payload | None,
        read: Callable[[httpx.Response], Awaitable[T]],
        reconnect: bool = True,
    ) -> T:
        try:
            async with self._place() as pool, asyncio.timeout(self._timeout):
                return await self._with_retries(pool, method, path, payload, read, reconnect)
        except TimeoutError:
            message = (
                f"{self.server} did not answer within {self._timeout:g} s: raise the time-out, or lower max_concurrency"
            )
            raise HttpError(message, "timeout") from None
        except asyncio.CancelledError:
            if self._closing:
                raise HttpError("the engine was closed before the answer came: open a new one, send it again") from None
            raise

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[httpx.AsyncClient]:
        """Wait for one of the `max_concurrency` places; yields the connection pool of that place."""
        number = await self._places.get()
        try:
            yield self._pool(number)
        finally:
            self._places.put_nowait(number)

    async def _with_retries(
        self,
        pool: httpx.AsyncClient,
        method: str,
        path: str,
        payload: Payload | None,
        read: Callable[[httpx.Response], Awaitable[T]],
        reconnect: bool,
    ) -> T:
        # ASCII escapes, so that lone surrogates cannot fail to be encoded.
        body = None if payload is None else json.dumps(payload()).encode("ascii")
        deadline = time.monotonic() + self._timeout
        for attempt in range(self._retries + 1):
            pause, last = BACKOFF_SECONDS * 2**attempt * random.uniform(0.5, 1.0), attempt == self._retries
            try:
                async with pool.stream(method, path, content=body) as response:
                    if response.is_success:
                        return await read(response)
                    await response.aread()
            except httpx.RequestError as error:
                fault: GuardError = HttpError(
                    f"cannot reach {self.server} ({type(error).__name__}): check the address and that the server runs"
                )
                last = last or not reconnect
            else:
                fault = self._fault_of(response)
                if response.status_code not in _RETRIED:
                    raise fault
                pause = max(pause, _retry_after(response))
            if last or time.monotonic() + pause >= deadline:
                raise fault
            await asyncio.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _pool(self, number: int) -> httpx.AsyncClient:
        if number not in self._pools:
            self._pools[number] = httpx.AsyncClient(
                base_url=self._url,
                headers={**self._headers, "Content-Type": "application/json"},
                verify=_certificates(),
                timeout=httpx.Timeout(None, connect=10.0),  # the deadline covers the rest
                limits=httpx.Limits(max_connections=_POOL, max_keepalive_connections=_POOL),
            )
        return self._pools[number]

    def _fault_of(self, response: httpx.Response) -> GuardError:
        """The error for an HTTP error status. It never quotes the body, in which servers quote the input."""
        status = response.status_code
        if status in (401, 403):
            return HttpError(f"{self.server} refused the API key: set OPENAI_API_KEY or api_key", "auth", status)
        if status == 413:
            return InputTooLongError(
                f"{self.server} takes no request of this size (HTTP 413): send less text or smaller images, or raise "
                "the server's limit"
            )
        if status in (400, 422) and _TOO_LONG.search(response.text):
            return InputTooLongError(
                "the exchange does not fit into the model's context: shorten it or lower max_pixels"
            )
        code = REFUSED if status in (400, 422) else HttpError.code
        remedy = "lower max_concurrency" if status == 429 else "see the server's log"
        return HttpError(f"{self.server} answered HTTP {status}: {remedy}", code, status)


async def _whole_body(response: httpx.Response) -> bytes:
    return await response.aread()


@cache
def _certificates() -> ssl.SSLContext:
    """The TLS certificates, read once for all clients: reading takes 25 ms."""
    return httpx.create_ssl_context()


def openai_key(api_key: str | None) -> str | None:
    """The key for an OpenAI-compatible server: `api_key`, or OPENAI_API_KEY if that is None."""
    return os.environ.get("OPENAI_API_KEY") if api_key is None else api_key


def _checked_url(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise EngineError("base_url is not a web address: give one such as http://localhost:8000/v1")
    return url.copy_with(path="/v1/") if url.path == "/" else url


def _checked_key(api_key: str) -> str:
    key = api_key.strip()
    if not (key.isascii() and key.isprintable()):
        raise EngineError("the API key contains characters that an HTTP header cannot contain: copy it again")
    return key


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait, from a number or an HTTP date; 0 if it sends neither."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
