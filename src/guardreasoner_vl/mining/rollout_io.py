"""How mining and rollouts ask about a row, and how they read the answer: as production's slow mode does."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.judging.effects import question
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.protocol import parse_verdict

if TYPE_CHECKING:
    from guardreasoner_vl.engines.base import EngineRequest, EngineResult
    from guardreasoner_vl.protocol import ParsedAnswer
    from guardreasoner_vl.types import Sample

_SEED_BYTES = 6  # below 2^53, so that every server's JSON carries it


def asked(sample: Sample) -> EngineRequest:
    """What the model is asked about a row. Raises `InputError`."""
    exchange, _ = checked_exchange(sample.exchange())
    return replace(question(exchange, Policy()), ban_empty_think=True)


def parsed(sample: Sample, answer: EngineResult) -> ParsedAnswer:
    """What the model said about a row."""
    exchange = sample.exchange()
    return parse_verdict(answer.text, exchange.has_prompt, exchange.has_response, answer.finish_reason)


def seed_of(name: str) -> int:
    """The seed of the answer with that name: it depends on nothing asked beside or before it."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:_SEED_BYTES])
