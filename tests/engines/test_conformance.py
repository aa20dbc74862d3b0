"""The conformance suite over the engines that need no model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.engines.openai.engine import OpenAIEngine
from guardreasoner_vl.engines.scripted import ALL_CAPABILITIES, ScriptedEngine
from tests.engines.conformance import EngineConformance
from tests.engines.openai.stub_server import StubServer, unharmful

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guardreasoner_vl.engines.base import Engine

BARE = replace(ALL_CAPABILITIES, images=False, scores=False, forced_prefix=False)


class TestScripted(EngineConformance):
    @pytest.fixture
    def engine(self) -> Engine:
        return ScriptedEngine(lambda request: unharmful([], request.forced_prefix))


class TestBareScripted(EngineConformance):
    @pytest.fixture
    def engine(self) -> Engine:
        return ScriptedEngine(lambda request: unharmful([], request.forced_prefix), capabilities=BARE)


class TestOpenAI(EngineConformance):
    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        with StubServer() as server:
            engine = OpenAIEngine(base_url=server.url).connect()
            yield engine
            engine.close()


class TestBareOpenAI(EngineConformance):
    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        with StubServer(images=False, logprobs=False, continues="ignored") as server:
            engine = OpenAIEngine(base_url=server.url).connect()
            yield engine
            engine.close()
