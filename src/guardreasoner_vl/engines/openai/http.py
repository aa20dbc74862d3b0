"""HTTP to an OpenAI-compatible server: deadline, retries, bounded concurrency, on an event loop of its own.

HTTP clients belong to one event loop, callers to any or none. So all requests run on one loop in a
thread; plain code waits for it, and coroutines on any loop await it, even where a loop already runs.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import httpx

from guardreasoner_vl.errors import EngineError, GuardError, InputTooLongError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
    from concurrent.futures import Future

    Payload: TypeAlias = Callable[[], Mapping[str, Any]]

T = TypeVar("T")

BACKOFF_SECONDS = 0.5
_RETRIED = frozenset({429, 500, 502, 503, 504})
_TOO_LONG = re.compile(
    r"(maximum|model's) (context|model) length|\(context length|max_model_len|context_length_exceeded|input_too_long"
)


class HttpError(EngineError):
    """A request that got no answer; `status` is the HTTP status if there was one."""

    def __init__(self, message: str, code: str = EngineError.code, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class LoopThread:
    """An event loop in a daemon thread, started at the first `submit`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.closed = False

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `work` on the loop; cancelling the future cancels it. Raises `EngineError` once closed."""
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
        """`submit` all and wait for all; an interrupt cancels them."""
        futures = [self.submit(work) for work in works]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel what still runs, do `last` and end the thread."""
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
    """GET and POST of JSON. All methods but the constructor belong to one event loop.

    A request waits for one of `max_concurrency` places, then has `timeout` seconds, retries included.
    """

    def __init__(
        self, base_url: str, api_key: str | None, *, max_concurrency: int, timeout: float, retries: int
    ) -> None:
        self._url = _checked_url(base_url)
        self._headers = {"Authorization": f"Bearer {_checked_key(api_key)}"} if api_key else {}
        self._max_concurrency = max_concurrency
        self._timeout = timeout
        self._retries = retries
        self._places = asyncio.Semaphore(max_concurrency)
        self._http: httpx.AsyncClient | None = None
        self._closing = False

    @property
    def server(self) -> str:
        """Scheme, host and port, without any password in the address."""
        return f"{self._url.scheme}://{self._url.netloc.decode('ascii')}"

    async def get(self, path: str) -> bytes:
        """The body of the answer. Raises `HttpError` or `InputTooLongError`."""
        return await self._within_deadline("GET", path, None, _whole)

    async def post(self, path: str, payload: Payload) -> bytes:
        """The body of the answer. Raises `HttpError` or `InputTooLongError`.

        `payload` is called once it is the request's turn: a long queue then holds no inlined images.
        """
        return await self._within_deadline("POST", path, payload, _whole)

    async def post_streamed(self, path: str, payload: Payload, read: Callable[[httpx.Response], Awaitable[T]]) -> T:
        """What `read` returns for the response, whose body has not been read yet, whatever its content type.

        `read` is called anew where the connection broke and the answer is asked for again. Raises what `post` and
        `read` raise.
        """
        return await self._within_deadline("POST", path, payload, read)

    def stop(self) -> None:
        """From now on a cancelled request ends in a fault, as its caller did not ask for that."""
        self._closing = True

    async def aclose(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()

    async def _within_deadline(
        self, method: str, path: str, payload: Payload | None, read: Callable[[httpx.Response], Awaitable[T]]
    ) -> T:
        try:
            async with self._places, asyncio.timeout(self._timeout):
                return await self._with_retries(method, path, payload, read)
        except TimeoutError:
            raise HttpError(f"{self.server} gave no answer within {self._timeout:g} s", "timeout") from None
        except asyncio.CancelledError:
            if self._closing:
                raise HttpError("the engine was closed before the answer came") from None
            raise

    async def _with_retries(
        self, method: str, path: str, payload: Payload | None, read: Callable[[httpx.Response], Awaitable[T]]
    ) -> T:
        # Escaped to ASCII, so that no text can fail to be encoded.
        body = None if payload is None else json.dumps(payload()).encode("ascii")
        deadline = time.monotonic() + self._timeout
        for attempt in range(self._retries + 1):
            pause = BACKOFF_SECONDS * 2**attempt * random.uniform(0.5, 1.0)
            try:
                async with self._client().stream(method, path, content=body) as response:
                    if response.is_success:
                        return await read(response)
                    await response.aread()
            except httpx.RequestError as error:
                fault: GuardError = HttpError(
                    f"cannot reach {self.server} ({type(error).__name__}): check the address and that the server runs"
                )
            else:
                fault = self._fault_of(response)
                if response.status_code not in _RETRIED:
                    raise fault
                pause = max(pause, _retry_after(response))
            if attempt == self._retries or time.monotonic() + pause >= deadline:
                raise fault
            await asyncio.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _client(self) -> httpx.AsyncClient:
        if self._http is None:
            self._http = httpx.AsyncClient(
                base_url=self._url,
                headers={**self._headers, "Content-Type": "application/json"},
                verify=_certificates(),
                timeout=httpx.Timeout(None, connect=10.0),  # the deadline covers the rest
                limits=httpx.Limits(
                    max_connections=self._max_concurrency, max_keepalive_connections=self._max_concurrency
                ),
            )
        return self._http

    def _fault_of(self, response: httpx.Response) -> GuardError:
        """Say what an HTTP error means, never what its body says: servers quote the input there."""
        status = response.status_code
        if status in (401, 403):
            return HttpError(f"{self.server} refused the API key: set OPENAI_API_KEY or api_key", "auth", status)
        if status == 413 or (status in (400, 422) and _TOO_LONG.search(response.text)):
            return InputTooLongError("the exchange does not fit the model's context: shorten it or lower max_pixels")
        remedy = "lower max_concurrency" if status == 429 else "see the server's log"
        return HttpError(f"{self.server} answered HTTP {status}: {remedy}", status=status)


async def _whole(response: httpx.Response) -> bytes:
    return await response.aread()


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes 25 ms, and several clients may stand side by side."""
    return httpx.create_ssl_context()


def _checked_url(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise EngineError("base_url is no web address: give one such as http://localhost:8000/v1")
    return url.copy_with(path="/v1/") if url.path == "/" else url


def _checked_key(api_key: str) -> str:
    key = api_key.strip()
    if not (key.isascii() and key.isprintable()):
        raise EngineError("the API key holds characters that no HTTP header can carry: copy it again")
    return key


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait: a number or an HTTP date, 0 if neither."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
