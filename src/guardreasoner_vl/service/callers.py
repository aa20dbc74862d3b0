"""The service's callers: their keys, the keys' names, and how many exchanges each caller may have under way.

The audit log and the metrics name a caller by its key's name; the key itself is written nowhere.
"""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import GuardError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from guardreasoner_vl.service.config import ServiceConfig

ANONYMOUS = "anonymous"
"""The caller of a service without keys."""


class RefusedError(GuardError):
    """The service cannot take the exchange now; nothing was judged. `retry_after` is in seconds."""

    status = 503

    def __init__(self, message: str, reason: str, retry_after: int) -> None:
        super().__init__(message)
        self.code, self.retry_after = reason, retry_after


class QueueFullError(RefusedError):
    """Too many exchanges are under way, of all callers or of this one."""

    status = 429


@dataclass(frozen=True)
class Origin:
    """Where a request comes from: its id, its caller's name, and the caller's W3C `traceparent`."""

    request_id: str
    caller: str = ANONYMOUS
    traceparent: str | None = None


@dataclass
class _Caller:
    """One caller: its limits, the exchanges that it has under way, and those that it may still have judged now."""

    most_under_way: int
    per_minute: int | None
    under_way: int = 0
    allowance: float = 0.0
    refilled: float = 0.0


@dataclass
class Callers:
    """The service's callers. Its methods belong to one event loop; `clock` gives seconds.

    A key may be replaced (`reload`) while exchanges are under way; their callers keep what they have under way.
    """

    config: ServiceConfig
    clock: Callable[[], float] = time.monotonic
    _keys: list[tuple[bytes, str]] = field(default_factory=list)
    _callers: dict[str, _Caller] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reload(self.config)

    @property
    def names(self) -> Collection[str]:
        return self._callers.keys()

    @property
    def needs_key(self) -> bool:
        return bool(self._keys)

    def reload(self, config: ServiceConfig) -> None:
        """Take the keys and their limits from a new configuration, and nothing else."""
        limits = config.limits
        share = limits.queue if len({key.name for key in config.keys}) < 2 else -(-limits.queue // 2)
        made = {
            key.name: _Caller(key.under_way or share, key.per_minute, 0, float(key.per_minute or 0), self.clock())
            for key in config.keys
        } or {ANONYMOUS: _Caller(limits.queue, None)}
        for name, caller in made.items():
            if before := self._callers.get(name):
                caller.under_way = before.under_way
                if before.per_minute:  # a reload is no way to a fresh minute
                    caller.allowance = min(before.allowance, caller.allowance)
        self._keys = [(key.key.get_secret_value().encode(), key.name) for key in config.keys]
        self._callers = made

    def named(self, given: bytes) -> str | None:
        """The name of the caller with the key `given`, None if there is no such key.

        Every key is compared, so that the time reveals nothing; bytes, because the text may not be ASCII.
        """
        names = [name for key, name in self._keys if hmac.compare_digest(given, key)]
        return names[0] if names else None

    def admit(self, name: str, wait: int) -> None:
        """Count one more exchange of that caller.

        Raises `RefusedError`, whose `retry_after` is `wait` seconds unless the minute's limit gives a better number.
        """
        caller = self._callers.get(name)
        if caller is None:  # its key was taken away while the request came in
            raise RefusedError("the key is no longer valid: ask for a new one", "unauthorised", wait)
        if caller.under_way >= caller.most_under_way:
            raise QueueFullError(
                f"{caller.under_way} exchanges of this key are under way; wait for their verdicts", "caller_busy", wait
            )
        self._take_turn(caller)
        caller.under_way += 1

    def release(self, name: str) -> None:
        """Give back what `admit` counted."""
        if caller := self._callers.get(name):
            caller.under_way = max(0, caller.under_way - 1)

    def _take_turn(self, caller: _Caller) -> None:
        """Take one exchange from a bucket that holds one minute's and is refilled evenly. Raises `QueueFullError`."""
        if caller.per_minute is None:
            return
        now = self.clock()
        rate = caller.per_minute / 60
        caller.allowance = min(caller.per_minute, caller.allowance + (now - caller.refilled) * rate)
        caller.refilled = now
        if caller.allowance < 1:
            wait = int((1 - caller.allowance) / rate) + 1
            raise QueueFullError(
                f"this key may have {caller.per_minute} exchanges judged a minute; try again in {wait} s",
                "rate_limited",
                wait,
            )
        caller.allowance -= 1
