"""One piece of work for each iteration of the event loop, where a burst would take many at once."""

from __future__ import annotations

import asyncio


class Turnstile:
    """Lets one task after another through, so that what becomes ready at once does not keep a probe waiting."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def enter(self) -> None:
        """Wait for the turn; the caller's work up to its next await is then alone in its iteration."""
        async with self._turn:
            await asyncio.sleep(0)
