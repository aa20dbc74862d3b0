"""Guards for workers of a test's cluster, which import this module: scripted ones that die, refuse or differ."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.errors import MissingExtraError
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.types import ModelInfo
from tests.builders import answer

if TYPE_CHECKING:
    from guardreasoner_vl.engines.base import EngineRequest


def deadly_guard() -> Guard:
    """A guard whose process is killed by every exchange that says KILL, and by the first that names a file to make."""

    def reply(request: EngineRequest) -> str:
        text = request.messages[-1].text
        _, once, path = text.partition("ONCE ")
        if "KILL" in text or (once and _is_first(Path(path.split()[0]))):
            os.kill(os.getpid(), signal.SIGKILL)
        return answer("harmful" if "BAD" in text else "unharmful")

    return Guard(ScriptedEngine(reply))


def dying_guard() -> Guard:
    """A guard that kills its process while it is opened, as one that does not fit the memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")


def refused_guard() -> Guard:
    raise MissingExtraError("vllm", "vllm")


def broken_guard() -> Guard:
    raise RuntimeError("CUDA out of memory.\nTried to allocate 15 GiB")


class Revised(ScriptedEngine):
    """A model that is another one in every process."""

    @property
    def model(self) -> ModelInfo:
        return ModelInfo(name="scripted", revision=str(os.getpid()))


def differing_guard() -> Guard:
    return Guard(Revised([]))


def _is_first(path: Path) -> bool:
    try:
        path.open("xb").close()
    except FileExistsError:
        return False
    return True
