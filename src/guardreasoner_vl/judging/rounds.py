"""Judgings that advance together, round by round, so that each round's calls reach the engine as one batch.

A round answers one call of each judging. What joins between two rounds rides along in the next one, and an exchange of
many windows has one window in a round, so that it holds up nobody for longer than that.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from guardreasoner_vl.engines.validation import failed, unscored
from guardreasoner_vl.errors import CalledOffError, EngineError, GuardError
from guardreasoner_vl.judging.effects import Call, Count, Counted, Generate, Reply, Score
from guardreasoner_vl.protocol import CANDIDATES, QuoteFilter
from guardreasoner_vl.types import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guardreasoner_vl.engines.base import Engine, EngineRequest, Watch
    from guardreasoner_vl.judging.effects import Judging

WINDOWS_TOGETHER = 8
"""Windows in a round of a service; those of further exchanges wait for the next one."""

COUNTING_SECONDS = 0.05
"""How long a round of a service counts the tokens of long prompts, one at least, before it asks the engine."""

BRIEF = 32_000
"""Characters of a prompt that is counted at once, however many wait: milliseconds."""

Slots: TypeAlias = "tuple[str, ...] | None"
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Live:
    """A judging under way; `call` is what it waits for, None as long as it has not begun."""

    judging: Judging
    watch: Watch | None
    done: Callable[[Verdict], None]
    call: Call | None = None

    @property
    def is_window(self) -> bool:
        return isinstance(self.call, Generate | Score) and self.call.is_window

    @property
    def is_single(self) -> bool:
        return isinstance(self.call, Generate | Score) and not self.call.is_window


class Rounds:
    """Judgings and the engine that answers them; `most` calls are put to it at once, `windows` of them windows.

    Of a judging that is called off, nothing more is asked: it ends in an error verdict.
    """

    def __init__(self, engine: Engine, most: int | None = None, windows: int | None = None) -> None:
        self._engine, self._most, self._windows = engine, most, windows
        self._live: list[_Live] = []
        self._windows_first = False

    def __len__(self) -> int:
        return len(self._live)

    def add(self, judging: Judging, watch: Watch | None, done: Callable[[Verdict], None]) -> None:
        """Let one more take part; `done` is told its verdict as soon as it stands."""
        self._live.append(_Live(judging, watch, done))

    def step(self) -> None:
        """One round: begin, count, and at most one batch of each kind of call."""
        self._begin()
        for live in [one for one in self._live if one.call and one.watch and one.watch.called_off]:
            self._settle(live, call_off(live.judging))
        self._count_long()
        self._ask(self._chosen())

    def _begin(self) -> None:
        """Begin no more than the engine takes: an exchange that has begun holds its images."""
        single = sum(live.is_single for live in self._live)
        for live in [one for one in self._live if one.call is None]:
            if self._most is not None and single >= self._most:
                return
            self._settle(live, advance(live.judging, None))
            self._count_brief(live)
            single += live.is_single

    def _count_brief(self, live: _Live) -> None:
        while isinstance(live.call, Count) and _is_brief(live.call):
            self._count(live, live.call)

    def _count_long(self) -> None:
        """Long prompts in turn; all of them where nobody else waits for the engine."""
        until = math.inf if self._most is None else time.monotonic() + COUNTING_SECONDS
        waiting = deque(live for live in self._live if isinstance(live.call, Count))
        while waiting and time.monotonic() < until:
            live = waiting.popleft()
            if isinstance(live.call, Count):
                self._move_back(live)
                self._count(live, live.call)
                self._count_brief(live)
                waiting.append(live)

    def _count(self, live: _Live, call: Count) -> None:
        self._settle(live, advance(live.judging, counted(self._engine, call)))

    def _move_back(self, live: _Live) -> None:
        self._live.remove(live)
        self._live.append(live)

    def _chosen(self) -> list[_Live]:
        """Whose calls go in: single ones first come, first served; windows in turn."""
        windows = [live for live in self._live if live.is_window][: self._windows]
        others = [live for live in self._live if live.is_single]
        if self._most is not None:
            self._windows_first = not self._windows_first
            others = others[: self._most - min(len(windows), self._most // 2 or int(self._windows_first))]
            windows = windows[: self._most - len(others)]
        return others + windows

    def _ask(self, chosen: Sequence[_Live]) -> None:
        groups: dict[Slots, list[_Live]] = {}
        for live in chosen:
            groups.setdefault(live.call.slots if isinstance(live.call, Score) else None, []).append(live)
        for slots, group in groups.items():
            requests = [watched(live.call, live.watch).request for live in group if live.call]
            replies = answers(self._engine, requests, slots)
            for live, reply in zip(group, replies, strict=True):
                if live.is_window:
                    self._move_back(live)
                self._settle(live, advance(live.judging, reply))

    def _settle(self, live: _Live, outcome: Call | Verdict) -> None:
        if isinstance(outcome, Verdict):
            live.call = None
            self._live.remove(live)
            live.done(outcome)
        else:
            live.call = outcome


def _is_brief(call: Count) -> bool:
    return sum(len(message.text) for message in call.request.messages) <= BRIEF


def advance(judging: Judging, reply: Reply | None) -> Call | Verdict:
    """Its next call, or its verdict; `reply` None begins it."""
    try:
        return next(judging) if reply is None else judging.send(reply)
    except StopIteration as stop:
        verdict: Verdict = stop.value
        return verdict


def call_off(judging: Judging) -> Call | Verdict:
    """End a judging that has begun: its verdict is the error."""
    try:
        return judging.throw(CalledOffError())
    except StopIteration as stop:
        verdict: Verdict = stop.value
        return verdict


def answers(engine: Engine, requests: Sequence[EngineRequest], slots: Slots) -> Sequence[Reply]:
    """The engine's results. It should not raise; if it does, each request is tried alone."""
    try:
        results: Sequence[Reply] = (
            engine.generate(requests) if slots is None else engine.score(requests, slots, CANDIDATES)
        )
        if len(results) != len(requests):
            raise EngineError(f"the engine gave {len(results)} results for {len(requests)} requests")
    except Exception as error:
        if len(requests) == 1:
            return [unanswered(error, slots)]
    else:
        return results
    return [reply for request in requests for reply in answers(engine, [request], slots)]


def counted(engine: Engine, call: Count) -> Counted:
    """What does not count is left to the engine, which refuses it with the reason."""
    try:
        return Counted(engine.count_tokens(call.request), engine.capabilities.max_context)
    except Exception as error:
        _log.debug("tokens cannot be counted", exc_info=error)
        return Counted(None, None)


def unanswered(error: Exception, slots: Slots) -> Reply:
    """What a call is answered with if the engine raised."""
    known = error if isinstance(error, GuardError) else fault("the engine", error)
    return failed(known) if slots is None else unscored(known)


def fault(what: str, error: Exception) -> EngineError:
    """What an unforeseen error looks like from outside; its text stays in, for it may quote the input."""
    _log.warning("%s failed: %s", what, type(error).__name__)
    _log.debug("%s failed", what, exc_info=error)
    return EngineError(f"{what} failed ({type(error).__name__}); try again, the debug log has the details")


def watched(call: Call, watch: Watch | None) -> Call:
    """The call with a watch on the answer's text, from which unsupported quotes are taken."""
    if watch is None or not isinstance(call, Generate):
        return call
    return replace(call, request=replace(call.request, watch=_QuoteWatch(watch, call.request)))


class _QuoteWatch:
    """Tells a watch what may be shown: a quote when it is closed and stands in what was asked."""

    def __init__(self, watch: Watch, request: EngineRequest) -> None:
        self._watch, self._request = watch, request
        self._quotes = self._filter()

    def begin(self) -> None:
        self._quotes = self._filter()
        self._watch.begin()

    def tell(self, text: str) -> None:
        if shown := self._quotes.add(text):
            self._watch.tell(shown)

    @property
    def called_off(self) -> bool:
        return self._watch.called_off

    def _filter(self) -> QuoteFilter:
        return QuoteFilter(self._request.messages, bool(self._request.images))
