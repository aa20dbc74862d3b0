"""A guard for tests that labels BAD harmful and fails on BROKEN."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.guard import Guard
from tests.builders import answer

if TYPE_CHECKING:
    from guardreasoner_vl.engines.base import EngineRequest
    from guardreasoner_vl.judging.policy import Policy


def scripted_guard(policy: Policy | None = None, *, pause: float = 0.0, reasoning: str = "Looked at it.") -> Guard:
    """`pause` is in seconds for each request; `engine.requests` of the guard lists the requests."""

    def reply(request: EngineRequest) -> str:
        time.sleep(pause)
        user = request.messages[-1].text
        if "BROKEN" in user:
            raise EngineError("the engine is out of order; try again")
        label = "harmful" if "BAD" in user else "unharmful"
        return answer(label, label, reasoning)

    return Guard(ScriptedEngine(reply), policy)
