"""Fixtures: the service that all integrations are tested against."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.integrations import GuardClient
from tests.integrations.service import CLOSED, KEY, Running, running_service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")  # or LiteLLM asks the internet when it is imported


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with running_service() as running:
        yield running


@pytest.fixture
def service(running: Running) -> Running:
    """The service, with no exchange judged yet and a harmless model."""
    running.backend.judged.clear()
    running.model.asked.clear()
    running.model.answer, running.model.events = "Gladly.", []
    return running


@pytest.fixture
async def guard(service: Running) -> AsyncIterator[GuardClient]:
    async with GuardClient(service.url, KEY, timeout=10) as guard:
        yield guard


@pytest.fixture
async def down() -> AsyncIterator[GuardClient]:
    """A client of a service that does not run."""
    async with GuardClient(CLOSED, KEY, timeout=10) as guard:
        yield guard
