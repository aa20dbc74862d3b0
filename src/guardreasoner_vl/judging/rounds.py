"""Advances many judgings in rounds, so that each round's calls reach the engine as one batch.

A round answers one call of each judging. Exchanges that arrive between two rounds join the next one. An exchange of
many windows has one window in a round, so that others never wait for all its windows.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from concurrent.futures import wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from guardreasoner_vl.engines.validation import error_result, error_score
from guardreasoner_vl.errors import EngineError, GuardError, RequestCancelledError
from guardreasoner_vl.images.ocr import start_reading
from guardreasoner_vl.judging.effects import (
    CountCall,
    EngineCall,
    EngineReply,
    GenerateCall,
    ModelCall,
    PrintedText,
    ReadCall,
    ScoreCall,
    TokenCount,
)
from guardreasoner_vl.protocol import CANDIDATES, QuoteFilter
from guardreasoner_vl.types import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from guardreasoner_vl.engines.base import Engine, EngineRequest, StreamListener
    from guardreasoner_vl.judging.effects import JudgingSteps
    from guardreasoner_vl.types import ModelInfo

WINDOWS_TOGETHER = 8
"""Largest number of windows in a round of a service; other exchanges' windows wait for the next round."""

COUNTING_SECONDS = 0.05
"""Seconds that a round of a service spends on counting the tokens of long prompts; it counts at least one."""

WAITING_SECONDS = 0.05
"""Longest time that a round waits for an image to be read if it has nothing else to do."""

BRIEF = 32_000
"""Prompts of at most this many characters are counted immediately, because counting takes milliseconds."""

Slots: TypeAlias = "tuple[str, ...] | None"
CallT = TypeVar("CallT", bound=EngineCall)
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _ActiveJudging:
    """A judging in progress; `call` is the call that it waits for, None before its first step.

    `reading` is the work on a `ReadCall`, once it has begun.
    """

    judging: JudgingSteps
    listener: StreamListener | None
    done: Callable[[Verdict], None]
    call: EngineCall | None = None
    reading: Future[str] | None = None

    @property
    def is_window(self) -> bool:
        """Whether the judging waits for a model call about one of many windows."""
        return isinstance(self.call, ModelCall) and self.call.is_window

    @property
    def is_single(self) -> bool:
        """Whether the judging waits for a model call about a whole exchange."""
        return isinstance(self.call, ModelCall) and not self.call.is_window


class Rounds:
    """Runs judgings with one engine.

    The engine gets at most `max_batch_size` calls at once, at most `max_windows` of them about windows. A cancelled
    judging makes no further calls and ends with an error verdict.
    """

    def __init__(self, engine: Engine, max_batch_size: int | None = None, max_windows: int | None = None) -> None:
        self._engine, self._max_batch_size, self._max_windows = engine, max_batch_size, max_windows
        self._active: list[_ActiveJudging] = []
        self._windows_first = False

    def __len__(self) -> int:
        return len(self._active)

    def add(self, judging: JudgingSteps, listener: StreamListener | None, done: Callable[[Verdict], None]) -> None:
        """Add a judging; `done` is called with its verdict as soon as it is known."""
        self._active.append(_ActiveJudging(judging, listener, done))

    def step(self) -> None:
        """Run one round: start judgings, read images, count tokens, and run at most one batch of each kind of call.

        Images are read in a thread of their own, and a round waits for them only if it has nothing else to do.
        """
        self._start()
        for active in [item for item in self._active if item.call and item.listener and item.listener.cancelled]:
            if active.reading:
                active.reading.cancel()
            self._update(active, cancel_judging(active.judging))
        self._read_images()
        self._count_long()
        batch = self._next_batch()
        self._call_engine(batch)
        if not batch:
            wait([active.reading for active in self._active if active.reading], WAITING_SECONDS, "FIRST_COMPLETED")

    def _start(self) -> None:
        """Start no more judgings than the engine has room for, because a started one keeps its images in memory.

        As many judgings again may wait for their images to be read.
        """
        single = sum(active.is_single for active in self._active)
        read = sum(isinstance(active.call, ReadCall) for active in self._active)
        for active in [item for item in self._active if item.call is None]:
            if self._max_batch_size is not None and max(single, (single + read) / 2) >= self._max_batch_size:
                return
            self._update(active, advance(active.judging, None))
            self._count_brief(active)
            single += active.is_single
            read += isinstance(active.call, ReadCall)

    def _read_images(self) -> None:
        """Start to read the next image of each judging, and advance the judgings whose image has been read."""
        for active in list(self._active):
            while isinstance(active.call, ReadCall):
                active.reading = active.reading or start_reading(active.call.image)
                if not active.reading.done():
                    break
                finished, active.reading = active.reading, None
                self._update(active, advance(active.judging, _printed(finished)))
                self._count_brief(active)

    def _count_brief(self, active: _ActiveJudging) -> None:
        while isinstance(active.call, CountCall) and _is_brief(active.call):
            self._count(active, active.call)

    def _count_long(self) -> None:
        """Count the tokens of long prompts, one exchange after another; all of them if there is no limit on calls."""
        until = math.inf if self._max_batch_size is None else time.monotonic() + COUNTING_SECONDS
        waiting = deque(active for active in self._active if isinstance(active.call, CountCall))
        while waiting and time.monotonic() < until:
            active = waiting.popleft()
            if isinstance(active.call, CountCall):
                self._move_back(active)
                self._count(active, active.call)
                self._count_brief(active)
                waiting.append(active)

    def _count(self, active: _ActiveJudging, call: CountCall) -> None:
        self._update(active, advance(active.judging, count_prompt_tokens(self._engine, call)))

    def _move_back(self, active: _ActiveJudging) -> None:
        self._active.remove(active)
        self._active.append(active)

    def _next_batch(self) -> list[_ActiveJudging]:
        """Choose the judgings whose calls run next: whole exchanges in order of arrival, windows in turn."""
        windows = [active for active in self._active if active.is_window][: self._max_windows]
        others = [active for active in self._active if active.is_single]
        if self._max_batch_size is not None:
            self._windows_first = not self._windows_first
            reserved = min(len(windows), self._max_batch_size // 2 or int(self._windows_first))
            others = others[: self._max_batch_size - reserved]
            windows = windows[: self._max_batch_size - len(others)]
        return others + windows

    def _call_engine(self, chosen: Sequence[_ActiveJudging]) -> None:
        groups: dict[Slots, list[_ActiveJudging]] = {}
        for active in chosen:
            groups.setdefault(active.call.slots if isinstance(active.call, ScoreCall) else None, []).append(active)
        for slots, group in groups.items():
            model = self._engine.model
            requests = [
                with_listener(active.call, active.listener, model).request
                for active in group
                if isinstance(active.call, ModelCall)
            ]
            replies = run_calls(self._engine, requests, slots)
            for active, reply in zip(group, replies, strict=True):
                if active.is_window:
                    self._move_back(active)
                self._update(active, advance(active.judging, reply))

    def _update(self, active: _ActiveJudging, outcome: EngineCall | Verdict) -> None:
        if isinstance(outcome, Verdict):
            active.call = None
            self._active.remove(active)
            active.done(outcome)
        else:
            active.call = outcome


def _is_brief(call: CountCall) -> bool:
    return sum(len(message.text) for message in call.request.messages) <= BRIEF


def advance(judging: JudgingSteps, reply: EngineReply | None) -> EngineCall | Verdict:
    """Advance a judging with the reply to its last call (None to start it); returns its next call or its verdict."""
    try:
        return next(judging) if reply is None else judging.send(reply)
    except StopIteration as stop:
        verdict: Verdict = stop.value
        return verdict


def cancel_judging(judging: JudgingSteps) -> EngineCall | Verdict:
    """Cancel a judging that has started; returns its error verdict."""
    try:
        return judging.throw(RequestCancelledError())
    except StopIteration as stop:
        verdict: Verdict = stop.value
        return verdict


def run_calls(engine: Engine, requests: Sequence[EngineRequest], slots: Slots) -> Sequence[EngineReply]:
    """The engine's results. If the engine raises, which it should not, each request is run alone."""
    try:
        results: Sequence[EngineReply] = (
            engine.generate(requests) if slots is None else engine.score(requests, slots, CANDIDATES)
        )
        if len(results) != len(requests):
            raise EngineError(
                f"the engine returned {len(results)} results for {len(requests)} requests; use another engine"
            )
    except Exception as error:
        if len(requests) == 1:
            return [error_reply(error, slots)]
    else:
        return results
    return [reply for request in requests for reply in run_calls(engine, [request], slots)]


async def aread(call: ReadCall) -> PrintedText:
    """Read an image without blocking the event loop; if the task is cancelled before that begins, it never does."""
    work = start_reading(call.image)
    await asyncio.gather(asyncio.wrap_future(work), return_exceptions=True)
    return _printed(work)


def _printed(finished: Future[str]) -> PrintedText:
    """The result of reading an image."""
    error = finished.exception()
    if error is None:
        return PrintedText(finished.result())
    if isinstance(error, GuardError):
        return PrintedText(error=error)
    return PrintedText(error=unexpected_error("reading an image", error))


def count_prompt_tokens(engine: Engine, call: CountCall) -> TokenCount:
    """Count a prompt's tokens. On an error the count is unknown, and the engine refuses the request later."""
    try:
        return TokenCount(engine.count_tokens(call.request), engine.capabilities.max_context)
    except Exception as error:
        _log.debug("tokens cannot be counted", exc_info=error)
        return TokenCount(None, None)


def error_reply(error: Exception, slots: Slots) -> EngineReply:
    """The reply to a call for which the engine raised `error`."""
    known = error if isinstance(error, GuardError) else unexpected_error("the engine", error)
    return error_result(known) if slots is None else error_score(known)


def unexpected_error(work: str, error: BaseException) -> EngineError:
    """The error to report for an unexpected one in `work`.

    The text of `error` goes to the debug log only, since it may quote the input.
    """
    _log.warning("%s failed: %s", work, type(error).__name__)
    _log.debug("%s failed", work, exc_info=error)
    return EngineError(f"{work} failed ({type(error).__name__}); try again; the debug log has the details")


def with_listener(call: CallT, listener: StreamListener | None, model: ModelInfo) -> CallT:
    """The call with a listener that receives the answer's text without unsupported quotes of `model`."""
    if listener is None or not isinstance(call, GenerateCall):
        return call
    return replace(call, request=replace(call.request, listener=_QuoteFilteringListener(listener, call.request, model)))


class _QuoteFilteringListener:
    """Passes text on to a listener, and withholds each quote until it is closed and found in the request."""

    def __init__(self, listener: StreamListener, request: EngineRequest, model: ModelInfo) -> None:
        self._listener, self._request = listener, request
        self._any_words = bool(request.images) and model.transcribes
        self._quotes = self._filter()

    def on_start(self) -> None:
        self._quotes = self._filter()
        self._listener.on_start()

    def on_text(self, text: str) -> None:
        if checked_text := self._quotes.add(text):
            self._listener.on_text(checked_text)

    @property
    def cancelled(self) -> bool:
        return self._listener.cancelled

    def _filter(self) -> QuoteFilter:
        return QuoteFilter(self._request.messages, self._any_words)
