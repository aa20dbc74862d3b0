"""Guards behind HTTP: order, how many items are judged at once, and what becomes of those in flight."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator

from guardreasoner_vl.baselines.over_http import GuardOverHttp
from guardreasoner_vl.engines.openai.http import HttpClient
from guardreasoner_vl.types import ModelInfo, Verdict, failed_verdict

_SECONDS = 60.0


class Waiting(GuardOverHttp[int]):
    """Answers item 1 only once item 2 was asked; `most` is the largest number of items in flight."""

    def __init__(self) -> None:
        super().__init__(HttpClient("http://localhost:9/v1", None))
        self.in_flight = self.most = 0
        self.waits, self.cancelled = threading.Event(), threading.Event()
        self._asked = asyncio.Event()

    async def _verdict(self, item: int) -> Verdict:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        if item == 2:
            self._asked.set()
        if item == 1:
            self.waits.set()
            try:
                async with asyncio.timeout(_SECONDS):
                    await self._asked.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        self.in_flight -= 1
        return failed_verdict("engine", str(item), "slow", ModelInfo(name="waiting"))


def test_the_next_item_is_sent_once_the_oldest_is_answered() -> None:
    with Waiting() as guard:
        verdicts = list(guard.moderate_batch(iter(range(7)), chunk=2))
        assert guard.most == 2
    assert [verdict.error.message for verdict in verdicts if verdict.error] == [str(item) for item in range(7)]


def test_a_batch_that_is_given_up_cancels_what_is_in_flight() -> None:
    with Waiting() as guard:
        verdicts = guard.moderate_batch(iter([0, 1, 3]), chunk=2)
        assert isinstance(verdicts, Generator)
        next(verdicts)
        assert guard.waits.wait(_SECONDS)
        verdicts.close()
        assert guard.cancelled.wait(_SECONDS)
