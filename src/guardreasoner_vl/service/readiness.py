"""Readiness of a guard, answered at once: a probe never waits behind the exchanges in flight.

A guard is ready once it has judged, and stays ready while verdicts come. A busy guard is not ready if its engine has
only failed for `fresh` seconds. An idle guard whose last verdict is old or was a fault judges a test exchange in the
background, and later probes report the result.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from guardreasoner_vl.types import Verdict

PROBE_SECONDS = 30.0
"""An idle guard that needs longer than this for the test exchange is not ready."""

_FAULTS = frozenset({"engine", "engine_gone", "deadline", "timeout", "auth"})
"""Error codes of the engine; a malformed answer or a refused input says nothing about the engine."""


class Readiness:
    """Readiness of one guard. `ask` judges a test exchange; a verdict counts as proof for `fresh` seconds."""

    def __init__(self, ask: Callable[[], Awaitable[Verdict]], fresh: float) -> None:
        self._ask, self._fresh = ask, fresh
        self._judges = False
        self._judged_at = float("-inf")
        self._faults_since: float | None = None
        self._probe: asyncio.Task[None] | None = None

    def observe(self, verdict: Verdict) -> None:
        """Update the readiness from a verdict."""
        if verdict.error is None:
            self._judges, self._judged_at, self._faults_since = True, time.monotonic(), None
        elif verdict.error.code in _FAULTS and self._faults_since is None:
            self._faults_since = time.monotonic()

    def is_ready(self, *, up: bool, idle: bool) -> bool:
        """Answer at once; may start a probe of a guard that is `up` and `idle`."""
        now = time.monotonic()
        if not up:
            self._judges, self._judged_at = False, float("-inf")
        elif idle:
            if self._faults_since is not None or now - self._judged_at > self._fresh:
                self.start_probe()
        elif self._faults_since is not None and now - self._faults_since >= self._fresh:
            return False
        return self._judges

    def start_probe(self) -> None:
        """Have the guard judge the test exchange in the background, unless that is in progress."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._run_probe())

    async def close(self) -> None:
        """Cancel a probe that is in progress."""
        if self._probe:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)

    async def _run_probe(self) -> None:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                verdict = await self._ask()
        except TimeoutError:
            self._judges = False
        else:
            self.observe(verdict)
            self._judges = verdict.error is None
