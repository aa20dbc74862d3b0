"""The base class of guards behind an HTTP server: concurrent requests, verdicts in order, closing of connections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from guardreasoner_vl.engines.openai.http import LoopThread

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from concurrent.futures import Future

    from guardreasoner_vl.engines.openai.http import HttpClient
    from guardreasoner_vl.types import Verdict

ItemT = TypeVar("ItemT")


class GuardOverHttp(ABC, Generic[ItemT]):
    """Judges items with `_verdict`, which runs on an event loop of this object in a thread."""

    def __init__(self, http: HttpClient) -> None:
        self._http, self._loop = http, LoopThread()

    def moderate_batch(self, items: Iterable[ItemT], *, chunk: int = 128) -> Iterator[Verdict]:
        """Yield verdicts in order; at most `chunk` items are judged at once, another once the oldest is answered."""
        waiting: deque[Future[Verdict]] = deque()
        try:
            for item in items:
                if len(waiting) == chunk:
                    yield waiting.popleft().result()
                waiting.append(self._loop.submit(self._verdict(item)))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Close the connections."""
        self._http.stop()
        self._loop.close(self._http.aclose)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    async def _verdict(self, item: ItemT) -> Verdict:
        """Judge one item; a failure becomes an `error` verdict."""
