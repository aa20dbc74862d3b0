"""Whether a guard judges, answered at once: a probe never waits behind the exchanges that are under way.

A guard is ready once it has judged, and stays so while verdicts come. One that is busy is not ready if its engine only
fails; one that is idle is asked about an exchange of our own if its last verdict is old or was a fault, and what comes
of that is the answer to later probes.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from guardreasoner_vl.types import Verdict

PROBE_SECONDS = 30.0
"""An idle guard that takes longer for one short exchange does not judge."""

_FAULTS = frozenset({"engine", "engine_gone", "deadline", "timeout", "auth"})
"""Codes of errors that are the engine's; an answer out of form, or an input that is refused, says nothing of it."""


class Readiness:
    """One guard's. `ask` judges an exchange of our own; a verdict speaks for the guard for `fresh` seconds."""

    def __init__(self, ask: Callable[[], Awaitable[Verdict]], fresh: float) -> None:
        self._ask, self._fresh = ask, fresh
        self._judges = False
        self._judged_at = float("-inf")
        self._faults_since: float | None = None
        self._probe: asyncio.Task[None] | None = None

    def heard(self, verdict: Verdict) -> None:
        """Take into account what came of an exchange."""
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
        """Ask the guard in the background, unless that is under way already."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._prove())

    async def close(self) -> None:
        """End what is asked in the background."""
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
