"""The service's callers: their keys, names and limits.

The audit log and the metrics name a caller by its key's name; the key itself is never written.
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
    """The service refuses the exchange without judging it. `retry_after` is in seconds."""

    status = 503

    def __init__(self, message: str, reason: str, retry_after: int) -> None:
        super().__init__(message)
        self.code, self.retry_after = reason, retry_after


class QueueFullError(RefusedError):
    """Too many exchanges are in flight, or too many were judged in this minute, of all callers or of this one."""

    status = 429


@dataclass(frozen=True)
class Origin:
    """The origin of a request: its id, its caller's name, and the caller's W3C `traceparent`."""

    request_id: str
    caller: str = ANONYMOUS
    traceparent: str | None = None


@dataclass
class _Caller:
    """One caller: its limits, its exchanges in flight, and its token bucket (`allowance`, in exchanges)."""

    max_in_flight: int
    per_minute: int | None
    in_flight: int = 0
    allowance: float = 0.0
    refilled: float = 0.0


@dataclass
class Callers:
    """All callers and their limits. Call the methods from one event loop only; `clock` returns seconds.

    Keys may be replaced (`reload`) while exchanges are in flight; a caller that stays keeps its count of them.
    """

    config: ServiceConfig
    clock: Callable[[], float] = time.monotonic
    _keys: list[tuple[bytes, str]] = field(default_factory=list)
    _callers: dict[str, _Caller] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reload(self.config)

    @property
    def names(self) -> Collection[str]:
        """The callers' names."""
        return self._callers.keys()

    @property
    def needs_key(self) -> bool:
        """Whether requests need a key."""
        return bool(self._keys)

    def reload(self, config: ServiceConfig) -> None:
        """Take the keys and their limits from a new configuration, and no other setting."""
        limits = config.limits
        share = limits.queue if len({key.name for key in config.keys}) < 2 else -(-limits.queue // 2)
        callers = {
            key.name: _Caller(key.max_in_flight or share, key.per_minute, 0, float(key.per_minute or 0), self.clock())
            for key in config.keys
        } or {ANONYMOUS: _Caller(limits.queue, None)}
        for name, caller in callers.items():
            if before := self._callers.get(name):
                caller.in_flight = before.in_flight
                if before.per_minute:  # a reload must not refill the bucket
                    caller.allowance = min(before.allowance, caller.allowance)
        self._keys = [(key.key.get_secret_value().encode(), key.name) for key in config.keys]
        self._callers = callers

    def named(self, candidate: bytes) -> str | None:
        """The name of the caller with that key; None if there is no such key.

        Every key is compared, in constant time, so that the duration reveals nothing. Keys are bytes, because
        `compare_digest` refuses text that is not ASCII.
        """
        names = [name for key, name in self._keys if hmac.compare_digest(candidate, key)]
        return names[0] if names else None

    def admit(self, name: str, wait: int) -> None:
        """Count one more exchange in flight for that caller.

        Raises `RefusedError`; its `retry_after` is `wait` seconds, or computed if the limit per minute is reached.
        """
        caller = self._callers.get(name)
        if caller is None:  # its key was removed while the request arrived
            raise RefusedError("the key is no longer valid: ask for a new one", "unauthorised", wait)
        if caller.in_flight >= caller.max_in_flight:
            raise QueueFullError(
                f"{caller.in_flight} exchanges of this key are in flight; wait for their verdicts", "caller_busy", wait
            )
        self._take_turn(caller)
        caller.in_flight += 1

    def release(self, name: str) -> None:
        """Count one exchange fewer in flight for that caller."""
        if caller := self._callers.get(name):
            caller.in_flight = max(0, caller.in_flight - 1)

    def _take_turn(self, caller: _Caller) -> None:
        """Take a token from the caller's bucket (size `per_minute`, refilled evenly). Raises `QueueFullError`."""
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
