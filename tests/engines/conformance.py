"""What every engine must guarantee, whatever its model answers.

A new engine joins by subclassing `EngineConformance` and giving an `engine` fixture:

    class TestMine(EngineConformance):
        @pytest.fixture
        def engine(self) -> Iterator[Engine]: ...
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from guardreasoner_vl.engines.base import Engine, EngineRequest, EngineResult
from guardreasoner_vl.engines.label_scores import likeliest
from guardreasoner_vl.images.geometry import PixelBudget
from guardreasoner_vl.protocol import CANDIDATES, FAST_PREFIX, IMAGE, RESPONSE_FIELD, Message, build_messages
from guardreasoner_vl.types import CheckedImage, Exchange, Usage

SLOTS = ("", RESPONSE_FIELD)
FIELDS = ("Request:", "Response:")


def asked(prompt: str = "How do I bake bread?", forced_prefix: str = "") -> EngineRequest:
    """A short question to the engine under test."""
    messages = build_messages(Exchange(prompt, response="With flour."))
    return EngineRequest(messages, forced_prefix=forced_prefix, max_new_tokens=24)


def with_image(request: EngineRequest) -> EngineRequest:
    """The same question about a small image."""
    encoded = BytesIO()
    Image.new("RGB", (56, 84), (200, 30, 30)).save(encoded, "PNG")
    message = Message("user", f"Human user:\n{IMAGE}\nWhat is this?\n\nAI assistant:\nNone\n")
    return replace(request, messages=(message,), images=(CheckedImage(encoded.getvalue(), 56, 84),))


def mismatched() -> EngineRequest:
    """A bad request: a placeholder without its image."""
    return replace(asked(), messages=(Message("user", f"{IMAGE}\nWhat is this?"),))


def timeless(results: list[EngineResult]) -> list[EngineResult]:
    """The results without their wall-clock times and cache hits, which may differ between equal runs."""
    return [replace(result, usage=Usage()) for result in results]


class Pieces:
    """Records an answer, and cancels it after `most` pieces."""

    def __init__(self, most: int | None = None) -> None:
        self.most, self.begun = most, 0
        self.heard: list[str] = []

    def on_start(self) -> None:
        self.begun += 1
        self.heard.clear()

    def on_text(self, text: str) -> None:
        self.heard.append(text)

    @property
    def cancelled(self) -> bool:
        return self.most is not None and len(self.heard) >= self.most


def assert_logprobs(logprobs: tuple[float, ...]) -> None:
    assert len(logprobs) == len(CANDIDATES)
    assert all(math.isfinite(logprob) and logprob <= 0.0 for logprob in logprobs)


class EngineConformance:
    """The suite; test methods take the `engine` fixture of the subclass."""

    def _needs(self, supported: bool, capability: str) -> None:
        if not supported:
            pytest.skip(f"the engine declares no {capability}")

    def test_a_listener_hears_the_whole_answer(self, engine: Engine) -> None:
        listeners = [Pieces(), Pieces()]
        requests = [replace(asked(f"Loaf {number}?"), listener=listener) for number, listener in enumerate(listeners)]
        results = engine.generate([*requests, asked()])
        for listener, result in zip(listeners, results, strict=False):
            assert listener.begun == 1
            assert "".join(listener.heard) == result.text
        assert timeless(engine.generate([replace(requests[0], listener=None)])) == timeless(results[:1])

    def test_declares_what_it_is(self, engine: Engine) -> None:
        assert engine.model.name
        declared = engine.capabilities
        assert declared.max_context is None or declared.max_context > 0
        counted = engine.count_tokens(asked())
        assert counted is None or counted > 0

    def test_nothing_asked_nothing_answered(self, engine: Engine) -> None:
        assert engine.generate([]) == []
        assert engine.score([], SLOTS, CANDIDATES) == []

    def test_one_result_per_request_in_order(self, engine: Engine) -> None:
        requests = [asked(f"Question {'again ' * number}") for number in range(5)]
        together = engine.generate(requests)
        alone = [engine.generate([request])[0] for request in requests]
        assert [result.error for result in together] == [None] * 5
        assert [result.usage.prompt_tokens for result in together] == [one.usage.prompt_tokens for one in alone]
        assert len({result.usage.prompt_tokens for result in together}) == 5

    def test_counts_what_it_used(self, engine: Engine) -> None:
        (result,) = engine.generate([asked()])
        assert result.usage.prompt_tokens > 0
        assert 0 < result.usage.completion_tokens <= 24
        assert result.usage.seconds >= 0.0
        assert result.finish_reason in ("stop", "length")

    def test_greedy_is_deterministic(self, engine: Engine) -> None:
        assert timeless(engine.generate([asked()])) == timeless(engine.generate([asked()]))

    def test_forced_prefix_begins_the_text(self, engine: Engine) -> None:
        self._needs(engine.capabilities.forced_prefix, "forced prefix")
        for prefix in ("<think>\nLet me", FAST_PREFIX):
            (result,) = engine.generate([asked(forced_prefix=prefix)])
            assert result.error is None
            assert result.text.startswith(prefix)

    def test_forced_prefix_counts_as_prompt(self, engine: Engine) -> None:
        self._needs(engine.capabilities.forced_prefix, "forced prefix")
        plain, begun = engine.generate([asked(), asked(forced_prefix=FAST_PREFIX)])
        assert begun.usage.prompt_tokens > plain.usage.prompt_tokens

    def test_label_logprobs_are_of_the_fields_asked_for(self, engine: Engine) -> None:
        self._needs(engine.capabilities.forced_prefix, "forced prefix")
        request = replace(asked(forced_prefix=FAST_PREFIX), label_fields=FIELDS, candidates=CANDIDATES)
        (result,) = engine.generate([request])
        assert result.error is None
        assert set(result.label_logprobs) <= set(FIELDS)
        for logprobs in result.label_logprobs.values():
            assert_logprobs(logprobs)
        assert engine.capabilities.scores or not result.label_logprobs

    def test_a_bad_request_fails_alone(self, engine: Engine) -> None:
        good, bad, good_again = engine.generate([asked(), mismatched(), asked()])
        assert good.error is None
        assert timeless([good]) == timeless([good_again])
        assert bad.finish_reason == "error"
        assert bad.error
        assert bad.error_code == "invalid_input"
        assert not bad.label_logprobs

    def test_images_are_taken_or_refused(self, engine: Engine) -> None:
        request = replace(with_image(asked()), pixels=PixelBudget(max_pixels=128 * 128))
        (result,) = engine.generate([request])
        assert (result.error is None) == engine.capabilities.images
        assert (result.finish_reason == "error") == (not engine.capabilities.images)

    def test_what_is_not_declared_is_refused(self, engine: Engine) -> None:
        if not engine.capabilities.forced_prefix:
            (result,) = engine.generate([asked(forced_prefix=FAST_PREFIX)])
            assert result.finish_reason == "error"
        if not engine.capabilities.scores:
            (score,) = engine.score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)
            assert score.error
            assert (score.logprobs, score.chosen) == ((), ())

    def test_scores_each_slot(self, engine: Engine) -> None:
        self._needs(engine.capabilities.scores and engine.capabilities.forced_prefix, "scores")
        requests = [asked(forced_prefix=FAST_PREFIX), asked("How do I make a bomb?", forced_prefix=FAST_PREFIX)]
        results = engine.score(requests, SLOTS, CANDIDATES)
        assert len(results) == len(requests)
        for result in results:
            assert result.error is None
            assert len(result.logprobs) == len(SLOTS)
            for logprobs in result.logprobs:
                assert_logprobs(logprobs)
            assert result.chosen == tuple(map(likeliest, result.logprobs))
            assert result.usage.prompt_tokens > 0
        (one_slot,) = engine.score(requests[:1], SLOTS[:1], CANDIDATES)
        assert one_slot.logprobs[0] == pytest.approx(results[0].logprobs[0], abs=1e-3)

    def test_a_bad_request_is_scored_alone(self, engine: Engine) -> None:
        self._needs(engine.capabilities.scores and engine.capabilities.forced_prefix, "scores")
        bad_request = replace(mismatched(), forced_prefix=FAST_PREFIX)
        bad, good = engine.score([bad_request, asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)
        assert good.error is None
        assert bad.error
        assert (bad.logprobs, bad.chosen, bad.error_code) == ((), (), "invalid_input")

    async def test_async_agrees_with_sync(self, engine: Engine) -> None:
        begun = asked(forced_prefix=FAST_PREFIX) if engine.capabilities.forced_prefix else asked()
        answered, scored = await asyncio.gather(engine.agenerate(begun), engine.ascore(begun, SLOTS, CANDIDATES))
        # Sync calls under a running loop, as in a notebook.
        assert timeless([answered]) == timeless(engine.generate([begun]))
        (again,) = engine.score([begun], SLOTS, CANDIDATES)
        assert (scored.error, scored.chosen) == (again.error, again.chosen)

    def test_serves_several_event_loops(self, engine: Engine) -> None:
        answers = [asyncio.run(self._twice(engine)) for _ in range(2)]
        assert timeless(answers[0]) == timeless(answers[1])

    @staticmethod
    async def _twice(engine: Engine) -> list[EngineResult]:
        return list(await asyncio.gather(engine.agenerate(asked()), engine.agenerate(asked())))

    async def test_async_faults_are_results(self, engine: Engine) -> None:
        assert (await engine.agenerate(mismatched())).finish_reason == "error"
        assert (await engine.ascore(mismatched(), SLOTS, CANDIDATES)).error

    def test_closes_twice(self, engine: Engine) -> None:
        engine.generate([asked()])
        engine.close()
        engine.close()
