"""A client of `POST /v1/guard` that always returns a verdict.

If the service does not answer, the verdict is an error that blocks.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

import httpx

from guardreasoner_vl.service.wire import blocked_reason, data_url
from guardreasoner_vl.types import ModelInfo, Verdict, failed_verdict

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping, Sequence

    from guardreasoner_vl.choices import Action, Mode

_log = logging.getLogger(__name__)
DEFAULT_URL = "http://127.0.0.1:8800"

__all__ = ["DEFAULT_URL", "GuardClient", "blocked_reason", "unjudged"]


class GuardClient:
    """Calls a guard service, from threads and from event loops.

    `on_error="allow"` allows an exchange, with a critical log line, while the service cannot be reached or is failing
    (429, 5xx, an unreadable answer). What the service refuses (4xx), could not judge, or did not judge in time is not
    allowed, so that the author of a request cannot bypass the guard. `timeout` is in seconds and exceeds the service's
    `limits.seconds` by default; the environment's proxies are not used.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        key: str | None = None,
        timeout: float = 150.0,
        *,
        guard: str | None = None,
        on_error: Action = "block",
        verify: bool | ssl.SSLContext = True,
    ) -> None:
        self._url = base_url.rstrip("/").removesuffix("/v1") + "/v1/guard"
        self._guard, self._on_error = guard, on_error
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        tls = httpx.create_ssl_context(verify, trust_env=False) if self._url[:6].lower() == "https:" else False
        self._options: dict[str, Any] = {"headers": headers, "timeout": timeout, "verify": tls, "trust_env": False}
        self._client = httpx.Client(**self._options)
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    def judge(
        self,
        prompt: str | None = None,
        images: Sequence[str | bytes | Path] = (),
        response: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        mode: Mode | None = None,
    ) -> Verdict:
        """Judge a prompt, images (`data:` URLs, bytes or files) and a response, or chat messages."""
        try:
            answer = self._client.post(self._url, json=self._body(prompt, images, response, messages, mode))
        except Exception as error:
            return self._failed(error, mode)
        return self._read(answer, mode)

    async def ajudge(
        self,
        prompt: str | None = None,
        images: Sequence[str | bytes | Path] = (),
        response: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        mode: Mode | None = None,
    ) -> Verdict:
        """`judge` without blocking the event loop."""
        try:
            body = self._body(prompt, images, response, messages, mode)
            answer = await self._async_client().post(self._url, json=body)
        except Exception as error:
            return self._failed(error, mode)
        return self._read(answer, mode)

    def close(self) -> None:
        """Close the synchronous connections."""
        self._client.close()

    async def aclose(self) -> None:
        """Close the synchronous connections and those of this event loop."""
        self.close()
        if client := self._clients.pop(asyncio.get_running_loop(), None):
            await client.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _async_client(self) -> httpx.AsyncClient:
        """The client of the running event loop: connections belong to one loop, and agents often run in a new loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = httpx.AsyncClient(**self._options)
        return self._clients[loop]

    def _body(
        self,
        prompt: str | None,
        images: Sequence[str | bytes | Path],
        response: str | None,
        messages: Sequence[Mapping[str, Any]] | None,
        mode: Mode | None,
    ) -> dict[str, Any]:
        body = {
            "prompt": prompt,
            "images": [_url_of_source(image) for image in images] or None,
            "response": response,
            "messages": None if messages is None else list(messages),
            "guard": self._guard,
            "mode": mode,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _read(self, answer: httpx.Response, mode: Mode | None) -> Verdict:
        status = answer.status_code
        if status != 200:
            failing = status == 429 or status >= 500
            remedy = "see the service's log" if failing else "check the key, the guard's name and the request"
            message = f"the guard service answered with status {status}: {remedy}"
            return self._unjudged("guard_refused", message, mode, failing)
        try:
            return Verdict.model_validate_json(answer.content)
        except ValueError:
            message = "the guard service returned no verdict: check that base_url is a guardreasoner-vl service"
            return self._unjudged("guard_malformed", message, mode, failing=True)

    def _failed(self, error: Exception, mode: Mode | None) -> Verdict:
        if isinstance(error, (httpx.ReadTimeout, httpx.WriteTimeout)):
            message = "the guard service did not answer in time: raise timeout, or send less"
            return self._unjudged("guard_timeout", message, mode, failing=False)
        reason = type(error).__name__
        if isinstance(error, (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)):
            # So may a request look that is too large: the service refuses it before it has read all of it.
            message = f"the guard service hung up before it answered ({reason}): see the service's log, or send less"
            return self._unjudged("guard_hung_up", message, mode, failing=False)
        if isinstance(error, httpx.TransportError):
            message = f"the guard service cannot be reached ({reason}): check base_url and that the service runs"
            return self._unjudged("guard_unreachable", message, mode, failing=True)
        message = f"the request cannot be sent ({type(error).__name__}): check its images and messages"
        return self._unjudged("guard_unasked", message, mode, failing=False)

    def _unjudged(self, code: str, message: str, mode: Mode | None, failing: bool) -> Verdict:
        if failing and self._on_error == "allow":
            _log.critical("allowed without judgement: %s", message, extra={"code": code})
            return unjudged(code, message, mode).model_copy(update={"action": "allow"})
        _log.error("blocked without judgement: %s", message, extra={"code": code})
        return unjudged(code, message, mode)


def unjudged(code: str, message: str, mode: Mode | None = None) -> Verdict:
    """A blocking error verdict for an exchange that no guard judged."""
    return failed_verdict(code, message, mode or "slow", ModelInfo(name="unknown"))


def _url_of_source(image: str | bytes | Path) -> str:
    """The image as a `data:` URL. Only a `Path` is read as a file, because a string may come from an end user."""
    if isinstance(image, str):
        return image
    return data_url(image.read_bytes() if isinstance(image, Path) else image)
