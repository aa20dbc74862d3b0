"""The cache of verdicts, and the keys of its entries."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from guardreasoner_vl.protocol import INSTRUCTION
from guardreasoner_vl.types import CheckedImage

if TYPE_CHECKING:
    from guardreasoner_vl.service.backend import Backend
    from guardreasoner_vl.types import Exchange, ImageSource, Mode, Verdict


class VerdictCache:
    """An LRU cache of at most `max_entries` verdicts, none older than `seconds`."""

    def __init__(self, max_entries: int, seconds: float) -> None:
        self._max_entries, self._seconds = max_entries, seconds
        self._verdicts: OrderedDict[str, tuple[float, Verdict]] = OrderedDict()

    def get(self, key: str) -> Verdict | None:
        """The verdict for that key; None if there is none or it is too old."""
        stored_at, verdict = self._verdicts.get(key, (0.0, None))
        if verdict is None or time.monotonic() - stored_at > self._seconds:
            return None
        self._verdicts.move_to_end(key)
        return verdict

    def keep(self, key: str, verdict: Verdict) -> None:
        """Store a verdict; no effect if `max_entries` is 0."""
        if self._max_entries:
            self._verdicts[key] = (time.monotonic(), verdict)
            if len(self._verdicts) > self._max_entries:
                self._verdicts.popitem(last=False)


def exchange_digest(exchange: Exchange) -> str:
    """SHA-256 of all turns; an image contributes the bytes or the `data:` URL that the caller sent."""
    digest = hashlib.sha256()
    for turn in (*exchange.history, exchange):
        parts = [_text_digest(turn.prompt), _text_digest(turn.response), *map(_source_digest, turn.images)]
        digest.update(json.dumps(parts).encode() + b"\n")
    return digest.hexdigest()


def _text_digest(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _source_digest(image: ImageSource) -> str:
    if isinstance(image, CheckedImage):
        image = image.png
    if isinstance(image, str):
        image = image.encode("utf-8", "surrogatepass")
    if not isinstance(image, bytes):
        raise TypeError(f"an image must be bytes or a data: URL, not {type(image).__name__}")
    return hashlib.sha256(image).hexdigest()


def cache_key(guard: str, backend: Backend, mode: Mode | None, digest: str) -> str:
    """SHA-256 of everything that a verdict depends on; the guard's policy is constant while the service runs."""
    parts = [guard, backend.model.name, backend.model.revision, INSTRUCTION, mode or backend.policy.mode, digest]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
