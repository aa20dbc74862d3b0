"""Exchanges that are judged together: the order of calls, and cancellation."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.guard import Guard, GuardRequest
from guardreasoner_vl.judging.effects import GenerateCall, build_request
from guardreasoner_vl.judging.judge import error_verdict
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.judging.rounds import Rounds, unexpected_error, with_listener
from guardreasoner_vl.types import Exchange, ModelInfo, Verdict
from tests.builders import answer
from tests.judging.test_judge import BENIGN, PHRASE, CountingEngine, finds_phrase
from tests.made_images import image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guardreasoner_vl.engines.base import EngineRequest, EngineResult
    from guardreasoner_vl.judging.effects import JudgingSteps

LONG = Exchange(BENIGN * 100 + PHRASE)
"""Judged in eight windows or so, the last of them harmful."""

Joining = list[tuple[GuardRequest, "Callable[[Verdict], None]"]]


class Noting(CountingEngine):
    """Records the size of each call."""

    def __init__(self, answers: Any = finds_phrase, limit: int = 2048, **values: Any) -> None:
        super().__init__(answers, limit=limit, **values)
        self.calls: list[int] = []
        self.windows: list[int] = []

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        self.calls.append(len(requests))
        self.windows.append(sum(BENIGN in request.messages[1].text for request in requests))
        return super().generate(requests)


class Watching:
    """A listener that cancels once `after` answers have started."""

    def __init__(self, after: int = 1_000_000) -> None:
        self.heard, self._begun, self._after = "", 0, after

    def on_start(self) -> None:
        self.heard = ""
        self._begun += 1

    def on_text(self, text: str) -> None:
        self.heard += text

    @property
    def cancelled(self) -> bool:
        return self._begun >= self._after


class Source:
    """Supplies the `rounds` in order, and records after which engine call each verdict was known."""

    def __init__(self, engine: Noting, *rounds: Sequence[Exchange | GuardRequest]) -> None:
        self._engine, self._rounds = engine, list(rounds)
        self.verdicts: list[tuple[int, Verdict]] = []
        self.in_flight: list[int] = []

    def __call__(self, in_flight: int) -> Joining:
        self.in_flight.append(in_flight)
        joining = self._rounds.pop(0) if self._rounds else ()
        return [(item if isinstance(item, GuardRequest) else GuardRequest(item), self._done) for item in joining]

    def _done(self, verdict: Verdict) -> None:
        self.verdicts.append((len(self._engine.calls), verdict))


def windowed(engine: Noting, **policy: Any) -> Guard:
    return Guard(engine, Policy(long_input="windows", **policy))


class TestServing:
    def test_short_ones_are_answered_between_the_windows_of_a_long_one(self) -> None:
        engine = Noting()
        source = Source(engine, [LONG], [Exchange("One.")], [], [Exchange("Two."), Exchange(PHRASE)])
        windowed(engine).moderate_from(source)
        assert [call for call, _ in source.verdicts[:3]] == [2, 4, 4]
        assert [verdict.flagged for _, verdict in source.verdicts] == [False, False, True, True]
        assert len(engine.calls) > 6
        assert engine.calls[1] == 2
        assert engine.calls[3] == 3
        assert source.in_flight[0] == source.in_flight[-1] == 0

    def test_a_short_one_waits_for_few_windows_however_many_long_ones_there_are(self) -> None:
        engine = Noting()
        source = Source(engine, [LONG] * 30, [Exchange("One.")])
        windowed(engine).moderate_from(source, 16)
        assert source.verdicts[0][0] <= 2
        assert max(engine.windows) == 8
        assert max(engine.calls) <= 16
        assert [verdict.flagged for _, verdict in source.verdicts] == [False, *[True] * 30]

    def test_windows_take_turns(self) -> None:
        engine = Noting()
        source = Source(engine, [LONG] * 16)
        windowed(engine).moderate_from(source)
        rounds = [call for call, _ in source.verdicts]
        assert max(rounds) - min(rounds) <= 1

    @pytest.mark.parametrize("most", [1, 2, 5])
    def test_no_more_than_so_many_are_put_to_the_engine_at_once(self, most: int) -> None:
        engine = Noting()
        source = Source(engine, [Exchange(f"Number {number}.") for number in range(11)], [LONG, LONG])
        windowed(engine).moderate_from(source, most)
        assert max(engine.calls) == most
        assert len(source.verdicts) == 13
        assert all(verdict.error is None for _, verdict in source.verdicts)

    @pytest.mark.parametrize("most", [1, 2, 3])
    def test_neither_short_ones_nor_windows_wait_for_a_flood_of_the_others(self, most: int) -> None:
        for steady, flood in ((LONG, Exchange("One.")), (Exchange("One."), LONG)):
            engine = Noting()
            source = Source(engine, [steady], *[[flood]] * 60)
            windowed(engine).moderate_from(source, most)
            flagged = steady is LONG
            answered = next(call for call, verdict in source.verdicts if verdict.flagged is flagged)
            assert answered < 40

    def test_half_of_the_places_are_kept_for_windows_and_of_one_place_every_second_turn(self) -> None:
        engine = Noting()
        windowed(engine).moderate_from(Source(engine, [LONG] * 6 + [Exchange("One.")] * 6), 6)
        assert (engine.calls[0], engine.windows[0]) == (6, 3)
        alone = Noting()
        windowed(alone).moderate_from(Source(alone, [LONG, Exchange("One."), Exchange("Two.")]), 1)
        assert alone.windows[:4] == [1, 0, 1, 0]

    @pytest.mark.slow
    def test_a_short_one_does_not_wait_until_all_long_ones_are_counted(self) -> None:
        class Weighing(Noting):
            long_counts = 0

            def count_tokens(self, request: EngineRequest) -> int:
                if len(request.messages[1].text) > 40_000:
                    self.long_counts += 1
                    time.sleep(0.06)
                return super().count_tokens(request)

        engine = Weighing(limit=20_000)
        waited: list[int] = []
        rounds = [[GuardRequest(Exchange(BENIGN * 1000))] * 12, [GuardRequest(Exchange("One."))]]

        def more(_: int) -> Joining:
            joining = rounds.pop(0) if rounds else []
            return [(asked, lambda _: waited.append(engine.long_counts)) for asked in joining]

        windowed(engine).moderate_from(more, 16)
        assert waited[0] <= 3
        assert len(waited) == 13

    def test_images_of_those_who_wait_are_not_opened(self) -> None:
        engine = Noting()
        begun: list[int] = []
        exchanges = [GuardRequest({"prompt": f"Number {number}."}) for number in range(9)]

        def more(in_flight: int) -> Joining:
            begun.append(len(engine.requests))
            return [(item, lambda _: None) for item in exchanges] if in_flight == 0 and not engine.requests else []

        windowed(engine).moderate_from(more, 3)
        assert engine.calls == [3, 3, 3]

    def test_all_in_one_mode_or_another(self) -> None:
        engine = Noting()
        invalid = GuardRequest("Nonsense")  # type: ignore[arg-type]  # the point
        source = Source(engine, [GuardRequest(LONG, "fast"), GuardRequest(LONG, "hybrid"), invalid, GuardRequest(LONG)])
        windowed(engine).moderate_from(source)
        codes = sorted(verdict.error.code if verdict.error else "" for _, verdict in source.verdicts)
        assert codes == ["", "", "", "invalid_input"]


def two_answers(number: int, begun: list[int]) -> JudgingSteps:
    """A judging that needs two answers, and records that it has begun."""
    begun.append(number)
    for _ in range(2):
        yield GenerateCall(build_request(Exchange("x"), Policy()))
    return error_verdict(EngineError("it says nothing"), Policy(), ModelInfo(name="toy"))


def test_no_more_judgings_begin_than_the_engine_has_room_for() -> None:
    rounds = Rounds(Noting(lambda _: answer()), 2)
    begun: list[int] = []
    ended: list[Verdict] = []
    for number in range(5):
        rounds.add(two_answers(number, begun), None, ended.append)
    steps = []
    while rounds:
        rounds.step()
        steps.append((len(begun), len(ended)))
    assert steps == [(2, 0), (2, 2), (4, 2), (4, 4), (5, 4), (5, 5)]
    assert begun == [0, 1, 2, 3, 4]


class TestCancelled:
    @pytest.mark.parametrize("after", [1, 3])
    def test_no_further_window_is_asked_about(self, after: int) -> None:
        engine = Noting()
        source = Source(engine, [GuardRequest(LONG, None, Watching(after)), LONG])
        windowed(engine).moderate_from(source)
        (call, given_up), (_, other) = source.verdicts
        assert call == after
        assert given_up.error is not None
        assert (given_up.error.code, given_up.action) == ("cancelled", "block")
        assert other.flagged is True
        assert engine.calls[after - 1] == 2
        assert engine.calls[after] == 1

    @pytest.mark.parametrize("mode", ["slow", "fast", "hybrid"])
    def test_who_is_gone_before_it_begins_costs_no_call(self, mode: Any) -> None:
        engine = Noting()
        source = Source(engine, [GuardRequest(LONG, mode, Watching(0)), GuardRequest(Exchange("x"), mode, Watching(0))])
        windowed(engine).moderate_from(source)
        assert engine.calls == []
        assert {verdict.action for _, verdict in source.verdicts} == {"block"}

    async def test_images_of_who_is_gone_before_it_begins_are_not_opened(self) -> None:
        engine = Noting()
        asked = GuardRequest(Exchange("x", (b"no image at all",)), None, Watching(0))
        source = Source(engine, [asked])
        windowed(engine).moderate_from(source)
        awaited = await windowed(engine).amoderate_each(asked)
        for verdict in (source.verdicts[0][1], awaited):
            assert verdict.error is not None
            assert verdict.error.code == "cancelled"

    def test_one_that_is_cancelled_between_windows_stops(self) -> None:
        engine = Noting()
        source = Source(engine, [GuardRequest(LONG, None, Watching(2))])
        windowed(engine).moderate_from(source)
        ((_, verdict),) = source.verdicts
        assert verdict.error is not None
        assert verdict.error.code == "cancelled"
        assert len(engine.requests) == 2

    async def test_an_awaited_one_stops_within_a_call(self) -> None:
        engine = Noting()
        verdict = await windowed(engine).amoderate_each(GuardRequest(LONG, None, Watching(2)))
        assert verdict.error is not None
        assert verdict.error.code == "cancelled"
        assert len(engine.requests) == 2

    async def test_a_cancelled_one_stops_within_a_call(self) -> None:
        class Slow(Noting):
            async def agenerate(self, request: EngineRequest) -> EngineResult:
                begun.set()
                await asyncio.sleep(0.01)
                return await super().agenerate(request)

        begun = asyncio.Event()
        engine = Slow()
        task = asyncio.create_task(windowed(engine).amoderate_each(GuardRequest(LONG)))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)
        assert len(engine.requests) <= 1


def test_a_missing_result_of_an_engine_is_an_error_verdict() -> None:
    class Losing(Noting):
        def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
            return super().generate(requests)[1:]

    (verdict,) = Guard(Losing()).moderate_batch([Exchange("One.")])
    assert verdict.error is not None
    assert (verdict.error.code, verdict.action) == ("engine", "block")
    assert verdict.error.message == "the engine returned 0 results for 1 requests; use another engine"


def test_an_engine_that_fails_on_a_batch_is_asked_one_by_one() -> None:
    class Fragile(Noting):
        def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
            if len(requests) > 1:
                raise RuntimeError("too many cakes")
            return super().generate(requests)

    engine = Fragile()
    verdicts = list(Guard(engine).moderate_batch([Exchange(BENIGN), Exchange(PHRASE), Exchange("One.")]))
    assert [verdict.flagged for verdict in verdicts] == [False, True, False]
    assert engine.calls == [1, 1, 1]


def test_the_text_of_an_unexpected_error_is_in_the_debug_log_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        error = unexpected_error("the engine", ValueError("mild words"))
    assert str(error) == "the engine failed (ValueError); try again; the debug log has the details"
    warning, detail = caplog.records
    assert (warning.levelname, warning.getMessage(), warning.exc_info) == (
        "WARNING",
        "the engine failed: ValueError",
        None,
    )
    assert (detail.levelname, detail.getMessage()) == ("DEBUG", "the engine failed")
    assert detail.exc_info is not None
    assert str(detail.exc_info[1]) == "mild words"


class TestStreamedQuotes:
    REASONING = 'The user writes "garden is full" and "mild words", so \'tis fine.'
    SHOWN = 'The user writes "garden is full" and [\u2026], so \'tis fine.'

    def test_streamed_reasoning_holds_no_unsupported_quote(self) -> None:
        listener = Watching()
        engine = Noting(lambda _: answer(reasoning=self.REASONING))
        source = Source(engine, [GuardRequest(Exchange(BENIGN), None, listener)])
        Guard(engine).moderate_from(source)
        assert listener.heard == answer(reasoning=self.SHOWN)
        ((_, verdict),) = source.verdicts
        assert (verdict.reasoning, verdict.unsupported_quotes) == (self.SHOWN, 1)

    def test_beside_an_image_every_quote_is_streamed(self) -> None:
        listener = Watching()
        engine = Noting(lambda _: answer(reasoning=self.REASONING))
        Guard(engine).moderate_from(Source(engine, [GuardRequest(Exchange(BENIGN, (image(56, 56),)), None, listener)]))
        assert listener.heard == answer(reasoning=self.REASONING)

    def test_a_model_that_cannot_copy_words_of_an_image_streams_no_quote_of_it(self) -> None:
        class NotTranscribing(Noting):
            @property
            def model(self) -> ModelInfo:
                return ModelInfo(name="toy", transcribes=False)

        listener = Watching()
        engine = NotTranscribing(lambda _: answer(reasoning=self.REASONING))
        Guard(engine).moderate_from(Source(engine, [GuardRequest(Exchange(BENIGN, (image(56, 56),)), None, listener)]))
        assert listener.heard == answer(reasoning=self.SHOWN)

    def test_text_before_a_start_is_checked_as_well(self) -> None:
        outer = Watching()
        call = with_listener(GenerateCall(build_request(Exchange(BENIGN), Policy())), outer, ModelInfo(name="m"))
        assert call.request.listener is not None
        call.request.listener.on_text('It says "mild words". Then "garden is full".')
        assert outer.heard == 'It says [\u2026]. Then "garden is full".'

    def test_letter_by_letter_and_anew(self) -> None:
        class Spelling(Noting):
            def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
                (request,) = requests
                listener = request.listener
                assert listener is not None
                listener.on_start()
                listener.on_text('<think>\nIt says "mild wo')
                assert "mild" not in outer.heard
                listener.on_start()
                for letter in answer(reasoning=TestStreamedQuotes.REASONING):
                    listener.on_text(letter)
                assert not listener.cancelled
                return super().generate([replace(request, listener=None)])

        outer = Watching()
        engine = Spelling(lambda _: answer())
        Guard(engine).moderate_from(Source(engine, [GuardRequest(Exchange(BENIGN), None, outer)]))
        assert outer.heard == answer(reasoning=self.SHOWN)


def test_batches_are_still_whole() -> None:
    engine = Noting()
    verdicts = list(windowed(engine).moderate_batch([LONG] * 12 + [Exchange("x")], chunk=13))
    assert [verdict.flagged for verdict in verdicts] == [*[True] * 12, False]
    assert engine.calls[0] == 13
    assert set(engine.calls[1:]) == {12}
