"""Whether a guard judges, answered at once: a probe never waits behind the exchanges that are under way.

A guard is ready once it has judged, and stays so while verdicts come. A busy guard is not ready if its engine only
fails. An idle guard whose last verdict is old or was a fault is asked about a test exchange in the background, and the
result is the answer to later probes.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from guardreasoner_vl.types import Verdict

PROBE_SECONDS = 30.0
"""A guard that needs longer for one short exchange while it is idle is not ready."""

_FAULTS = frozenset({"engine", "engine_gone", "deadline", "timeout", "auth"})
"""Codes of the engine's errors; a malformed answer, or an input that is refused, says nothing about the engine."""


class Readiness:
    """Of one guard. `ask` judges a test exchange; a verdict proves that the guard judges for `fresh` seconds."""

    def __init__(self, ask: Callable[[], Awaitable[Verdict]], fresh: float) -> None:
        self._ask, self._fresh = ask, fresh
        self._judges = False
        self._judged_at = float("-inf")
        self._faults_since: float | None = None
        self._probe: asyncio.Task[None] | None = None

    def heard(self, verdict: Verdict) -> None:
        """Note the verdict about an exchange."""
        if verdict.error is None:
            self._judges, self._judged_at, self._faults_since = True, time.monotonic(), None
        elif verdict.error.code in _FAULTS and self._faults_since is None:
            self._faults_since = time.monotonic()

    def is_ready(self, *, up: bool, idle: bool) -> bool:
        """Answers at once; a guard that is `up` and `idle` may be asked in the background."""
        now = time.monotonic()
        if not up:
            self._judges, self._judged_at = False, float("-inf")
        elif idle:
            if self._faults_since is not None or now - self._judged_at > self._fresh:
                self.prove()
        elif self._faults_since is not None and now - self._faults_since >= self._fresh:
            return False
        return self._judges

    def prove(self) -> None:
        """Ask the guard about the test exchange in the background, unless that is under way already."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._prove())

    async def close(self) -> None:
        """Cancel the test exchange that is under way, if there is one."""
        if self._probe:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)

    async def _prove(self) -> None:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                verdict = await self._ask()
        except TimeoutError:
            self._judges = False
        else:
            self.heard(verdict)
            self._judges = verdict.error is None
