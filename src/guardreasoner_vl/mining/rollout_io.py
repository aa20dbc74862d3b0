"""Requests and parsed answers of mining and rollouts, the same as in production's slow mode."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.judging.effects import build_request
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.protocol import parse_verdict

if TYPE_CHECKING:
    from guardreasoner_vl.engines.base import EngineRequest, EngineResult
    from guardreasoner_vl.protocol import ParsedAnswer
    from guardreasoner_vl.types import Exchange, Sample

_SEED_BYTES = 6  # below 2^53, which every JSON parser reads exactly


def rollout_request(sample: Sample) -> EngineRequest:
    """The request that asks the model to judge a row. Raises `InputError`."""
    return exchange_request(sample.exchange())


def exchange_request(exchange: Exchange) -> EngineRequest:
    """The request that asks the model to judge a row's exchange. Raises `InputError`."""
    checked, _ = checked_exchange(exchange)
    return replace(build_request(checked, Policy()), ban_empty_think=True)


def parse_rollout(sample: Sample, answer: EngineResult) -> ParsedAnswer:
    """Parse the model's answer about a row."""
    exchange = sample.exchange()
    return parse_verdict(answer.text, exchange.has_prompt, exchange.has_response, answer.finish_reason)


def derive_seed(name: str) -> int:
    """The seed of the answer called `name`; it does not depend on other requests."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:_SEED_BYTES])
