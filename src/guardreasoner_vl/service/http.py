"""uvicorn's HTTP/1.1 protocol with limits on a request's head: its size in bytes, and the seconds until it is complete.

`service.access` limits the body; it runs once the head is complete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio

HEAD_BYTES = 65_536


class BoundedHttp(HttpToolsProtocol):
    """Closes a connection if a request's head exceeds `HEAD_BYTES` or takes longer than `head_seconds`."""

    head_seconds = 30.0
    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first request's head."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head, and close the connection if there are too many."""
        if self._in_head:
            self._head_bytes += len(data)
            if self._timer is None:  # the next request of a kept-alive connection
                self._expect_head()
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        """End the head: its limits no longer apply."""
        self._in_head, self._head_bytes = False, 0
        self._forget()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Expect the head of the connection's next request."""
        self._in_head = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the time limit."""
        self._forget()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _forget(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


def bounded(head_seconds: float) -> type[BoundedHttp]:
    """The protocol class with that limit on the seconds for a request's head."""
    return type("BoundedHttp", (BoundedHttp,), {"head_seconds": head_seconds})
