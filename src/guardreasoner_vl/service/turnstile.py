"""Spreads a burst of work over iterations of the event loop, one piece for each."""

from __future__ import annotations

import asyncio


class Turnstile:
    """Lets one task through at a time, so that a burst of ready tasks does not keep a probe waiting."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def enter(self) -> None:
        """Wait for the turn; the caller's work up to its next await is then alone in its iteration."""
        async with self._turn:
            await asyncio.sleep(0)
