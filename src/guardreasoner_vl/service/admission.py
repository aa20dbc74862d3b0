"""Admission of work to the event loop: a burst is spread over iterations, one task in each."""

from __future__ import annotations

import asyncio


class AdmissionGate:
    """Lets one task pass in each iteration of the event loop, so that a burst does not delay health probes."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def enter(self) -> None:
        """Wait for a turn; until its next await the caller is then the only admitted task of its iteration."""
        async with self._turn:
            await asyncio.sleep(0)
