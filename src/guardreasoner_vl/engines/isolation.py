"""Keeps a request that fails from failing the batch that it is in."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from guardreasoner_vl.engines.base import EngineResult, ScoreResult
from guardreasoner_vl.errors import EngineError, GuardError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_log = logging.getLogger(__name__)
JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT", EngineResult, ScoreResult)


def isolate(
    jobs: Sequence[JobT], work: Callable[[Sequence[JobT]], list[ResultT]], refused: Callable[[GuardError], ResultT]
) -> list[ResultT]:
    """The jobs' results; jobs that fail together are halved until the failing one is alone.

    The wall-clock seconds of jobs that ran together are shared equally.
    """
    started = time.perf_counter()
    try:
        results = work(jobs)
    except Exception as error:
        if len(jobs) == 1:
            return [refused(reported(error))]
        results = []  # halve outside this block: the error's frames keep the failed batch in memory
    if not results:
        middle = len(jobs) // 2
        return isolate(jobs[:middle], work, refused) + isolate(jobs[middle:], work, refused)
    share = (time.perf_counter() - started) / len(jobs)
    return [
        replace(result, usage=result.usage.model_copy(update={"seconds": result.usage.seconds + share}))
        for result in results
    ]


def reported(error: Exception) -> GuardError:
    """The error to report. The text of an unexpected one goes to the debug log only, since it may quote the input."""
    if isinstance(error, GuardError):
        return error
    _log.warning("the model failed: %s", type(error).__name__)
    _log.debug("the model failed", exc_info=error)
    return EngineError(f"the model failed ({type(error).__name__}): try a smaller input")
