"""The settings that bound sizes, numbers and times, and the cache."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from guardreasoner_vl.images.decode import ImageLimits
from guardreasoner_vl.judging.policy import MAX_WINDOWS
from guardreasoner_vl.types import Frozen


class Limits(Frozen):
    """Bounds on sizes, numbers and times."""

    renamed_keys: ClassVar[dict[str, str]] = {"together": "max_batch_size"}

    body_bytes: int = Field(
        default=32_000_000, ge=1_000, description="Largest body of one request in bytes; a larger one gets status 413."
    )
    all_bodies_bytes: int = Field(
        default=512_000_000,
        ge=1_000,
        description="Bytes of all bodies in flight together; a request that would exceed them gets status 503.",
    )
    body_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Seconds that the head and the body of a request may each take to arrive; a slower body gets "
        "status 408, a slower head a closed connection. For an answer sent while it grows: seconds between two pieces.",
    )
    queue: int = Field(
        default=256,
        ge=1,
        description="Exchanges of one guard that are accepted and unanswered; one more gets status 429. Also the "
        "chats that wait for the model behind the proxy; one more gets status 503.",
    )
    max_batch_size: int = Field(
        default=128, ge=1, description="Exchanges of one guard that its model is given at once."
    )
    windows: int = Field(
        default=MAX_WINDOWS,
        ge=1,
        description="Windows of one exchange that exceeds the model's context; one that needs more is an "
        "`input_too_long` error.",
    )
    exchange_pixels: int = Field(
        default=ImageLimits.max_exchange_pixels,
        ge=1,
        description="Pixels of all images of one exchange with its history, frames included, counted before any is "
        "decoded; more is an `invalid_image` error.",
    )
    seconds: float = Field(
        default=120.0, gt=0, description="Seconds that one verdict may take; then it is a `deadline` error."
    )
    retry_after: int = Field(
        default=2, ge=1, description="Seconds in the `Retry-After` header of an exchange that is not accepted."
    )
    leave_seconds: float = Field(
        default=5.0,
        ge=0,
        description="Seconds after SIGTERM in which `/readyz` answers 503 while requests are still accepted. 0: stop "
        "accepting at once.",
    )
    drain_seconds: int = Field(
        default=60,
        ge=1,
        description="Seconds after `leave_seconds` to answer accepted requests; then connections are closed.",
    )
    ready_seconds: float = Field(
        default=5.0,
        ge=0,
        description="Age in seconds of an idle guard's last verdict at which a readiness probe has it judge a test "
        "exchange. 0: at every probe.",
    )


class CacheSection(Frozen):
    """Verdicts kept in memory for equal exchanges; errors are never kept."""

    entries: int = Field(
        default=0, ge=0, description="Verdicts to keep; the one unused for longest goes first. 0: no cache."
    )
    seconds: float = Field(default=3600.0, gt=0, description="Seconds after which a verdict is judged anew.")
