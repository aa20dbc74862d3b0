"""`Guard`: one by one, in batches, from an event loop, and with errors of callers and engines."""

from __future__ import annotations

import asyncio
import logging
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from guardreasoner_vl.engines.base import EngineRequest, EngineResult, ScoreResult
from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.errors import EngineError, InputError, ModelError
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.images.decode import ImageLimits
from guardreasoner_vl.judging.calibration import Calibration, ModeScales
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.protocol import IMAGE
from guardreasoner_vl.types import Exchange, Label, ModelInfo, Turn, Verdict
from tests.builders import answer
from tests.judging.test_judge import assert_error, scoring
from tests.made_images import image

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from guardreasoner_vl.types import ImageSource

BAD = "bomb"


def labels(request: EngineRequest) -> str:
    """Harmful where the last turn says so."""
    _, _, turn = request.messages[1].text.rpartition("Human user:\n")
    asked, _, answered = turn.partition("\n\nAI assistant:\n")
    return answer(*("harmful" if BAD in part else "unharmful" for part in (asked, answered)))


class Recording(ScriptedEngine):
    """Records the number of requests of each call."""

    def __init__(self, answers: Any = labels, **values: Any) -> None:
        super().__init__(answers, **values)
        self.calls: list[tuple[str, int]] = []
        self.closed = 0

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        self.calls.append(("generate", len(requests)))
        return super().generate(requests)

    def score(self, requests: Sequence[EngineRequest], *rest: Any) -> list[ScoreResult]:
        self.calls.append(("score", len(requests)))
        return super().score(requests, *rest)

    def close(self) -> None:
        self.closed += 1


def png(size: tuple[int, int] = (60, 60)) -> bytes:
    return image(*size).png


def gif(frames: int) -> bytes:
    """An animation whose frames differ."""
    images = [Image.new("RGB", (60, 60), (80 * number % 256, 30, 200)) for number in range(frames)]
    encoded = BytesIO()
    images[0].save(encoded, "GIF", save_all=True, append_images=images[1:])
    return encoded.getvalue()


class TestModerate:
    def test_text(self) -> None:
        guard = Guard(Recording())
        assert guard.moderate("How do I bake bread?").action == "allow"
        verdict = guard.moderate("How do I bake bread?", response=f"Take a {BAD}.")
        assert (verdict.request.label, verdict.response.label, verdict.action) == ("unharmful", "harmful", "block")

    def test_a_response_without_a_prompt(self) -> None:
        engine = Recording()
        verdict = Guard(engine).moderate(response=f"A {BAD}.")
        assert (verdict.request.label, verdict.response.label) == (Label.NOT_APPLICABLE, Label.HARMFUL)
        assert engine.requests[0].messages[1].text == f"Human user:\nNone\n\nAI assistant:\nA {BAD}.\n"

    def test_an_image_alone(self) -> None:
        engine = Recording()
        verdict = Guard(engine).moderate(images=[png()])
        assert (verdict.request.label, verdict.response.label) == (Label.UNHARMFUL, Label.NOT_APPLICABLE)
        assert engine.requests[0].messages[1].text == f"Human user:\n{IMAGE}\n\nAI assistant:\nNone\n"
        assert len(engine.requests[0].images) == 1

    def test_images_of_every_kind(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(png())
        engine = Recording()
        sources: list[ImageSource] = [
            png(),
            str(tmp_path / "a.png"),
            tmp_path / "a.png",
            Image.new("RGB", (60, 60)),
            image(60, 60),
        ]
        assert Guard(engine).moderate("x", images=sources).action == "allow"
        assert len(engine.requests[0].images) == len(sources)

    def test_every_frame_is_judged(self) -> None:
        engine = Recording()
        Guard(engine).moderate("x", images=[gif(3), png()])
        (request,) = engine.requests
        assert len(request.images) == 4
        assert request.messages[1].text.startswith("Human user:\n" + f"{IMAGE}\n" * 4 + "x")
        assert len({shown.digest for shown in request.images}) == 4

    def test_too_many_frames_are_refused(self) -> None:
        engine = Recording()
        assert_error(Guard(engine).moderate("x", images=[gif(17)]), "invalid_image")
        tight = Guard(engine, Policy(images=ImageLimits(max_frames=2)))
        assert_error(tight.moderate("x", images=[png()] * 7), "invalid_image")
        assert tight.moderate("x", images=[png()] * 6).action == "allow"
        history: list[dict[str, Any]] = [
            {"role": "user", "content": [part()] * 5},
            {"role": "assistant", "content": "ok"},
        ]
        verdict = tight.moderate_messages([*history, {"role": "user", "content": [part()] * 2}])
        assert_error(verdict, "invalid_image")
        assert len(engine.requests) == 1

    @pytest.mark.parametrize(
        ("values", "code"),
        [
            ({}, "invalid_input"),
            ({"prompt": " \n"}, "invalid_input"),
            ({"prompt": "\ud800"}, "invalid_input"),
            ({"prompt": 5}, "invalid_input"),
            ({"response": b"bytes"}, "invalid_input"),
            ({"images": "one.png"}, "invalid_input"),
            ({"images": 5}, "invalid_input"),
            ({"prompt": "x", "images": ["/no/such.png"]}, "invalid_image"),
            ({"prompt": "x", "images": ["https://example.org/a.png"]}, "invalid_image"),
            ({"prompt": "x", "images": [b"no image"]}, "invalid_image"),
            ({"prompt": "x", "images": [png()[:100]]}, "invalid_image"),
            ({"prompt": "x", "images": [None]}, "invalid_image"),
        ],
    )
    def test_bad_input_is_an_error_verdict(self, values: dict[str, Any], code: str) -> None:
        engine = Recording()
        assert_error(Guard(engine).moderate(**values), code)
        assert_error(Guard(engine, Policy(on_error="allow")).moderate(**values), code)
        assert engine.requests == []

    @pytest.mark.parametrize("mode", ["slow", "fast", "hybrid"])
    def test_the_mode_can_be_chosen_for_one_call(self, mode: Any) -> None:
        guard = Guard(Recording(scores=scoring(0.01)), Policy(mode="slow"))
        assert guard.moderate("x", mode=mode).mode == mode
        assert guard.moderate("x").mode == "slow"

    def test_wrong_settings_raise(self) -> None:
        guard = Guard(Recording())
        wrong: Any = "quick"
        with pytest.raises(InputError, match="slow, fast, hybrid"):
            guard.moderate("x", mode=wrong)
        with pytest.raises(InputError, match="unknown mode"):
            guard.moderate_batch([], mode=wrong)
        with pytest.raises(InputError, match="chunk"):
            guard.moderate_batch(["x"], chunk=0)  # type: ignore[list-item]  # never looked at
        with pytest.raises(InputError, match="auto, transformers, openvino, vllm, openai"):
            Guard.load(engine=wrong)
        with pytest.raises(ModelError, match="no such folder"):
            Guard.load("/no/such/folder")

    @pytest.mark.parametrize(
        ("measured", "served", "fits"),
        [
            (("other", None), ("served", None), False),
            (("served", None), ("served", None), True),
            (("served", "r1"), ("served", "r2"), False),
            (("other", "r1"), ("served", "r1"), True),
            (("served", "r1"), ("served", None), False),
            (("served", None), ("served", "r1"), False),
        ],
    )
    def test_a_calibration_of_another_model_is_refused(
        self, measured: tuple[str, str | None], served: tuple[str, str | None], fits: bool
    ) -> None:
        class Named(Recording):
            @property
            def model(self) -> ModelInfo:
                return ModelInfo(name=served[0], revision=served[1])

        scales, model = ModeScales(), ModelInfo(name=measured[0], revision=measured[1])
        policy = Policy(
            calibration=Calibration(model=model, data="d", fast=scales, slow=scales, band=(0.1, 0.9), reasoned=0.1)
        )
        if fits:
            assert Guard(Named(), policy).moderate("x").action == "allow"
            return
        with pytest.raises(InputError, match="calibrate again") as caught:
            Guard(Named(), policy)
        assert "\n" not in str(caught.value)

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["fast", "slow"])
    def test_the_embedded_guard_does_not_see_line_ends(self, mode: Any) -> None:
        text = "Write a note to my neighbour.\nIt is about\n\nthe old apple trees, and the\nfence."
        with Guard.load("embedded") as guard:
            first, *others = [
                guard.moderate(text.replace("\n", end), response=text.replace("\n", end), mode=mode)
                for end in ("\n", "\r\n", "\r")
            ]
        for other in others:
            assert (other.request, other.response, other.reasoning) == (first.request, first.response, first.reasoning)

    def test_it_closes_the_engine(self) -> None:
        engine = Recording()
        with Guard(engine) as guard:
            assert guard.model.name == "scripted"
            guard.moderate("x")
            assert engine.closed == 0
        assert engine.closed == 1
        with pytest.raises(ZeroDivisionError), Guard(engine):
            _ = 1 / 0
        assert engine.closed == 2

    @pytest.mark.slow
    def test_a_loaded_guard_moderates(self, tiny_model: Path) -> None:
        with Guard.load(str(tiny_model), dtype="fp32") as guard:
            verdict = guard.moderate("x", images=[png()], response="y", mode="fast")
            assert verdict.error is None
            assert verdict.request.score is not None
            assert_error(guard.moderate("kite " * 1000, mode="fast"), "input_too_long")
            windows = Guard(guard.engine, Policy(long_input="windows"))
            assert windows.moderate("kite " * 1000, mode="fast").error is None


def part() -> dict[str, Any]:
    from base64 import b64encode

    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64encode(png()).decode()}"}}


class TestMessages:
    def test_history_is_context_and_the_last_turn_is_judged(self) -> None:
        engine = Recording()
        verdict = Guard(engine).moderate_messages(
            [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": [{"type": "text", "text": f"A {BAD}?"}, part()]},
                {"role": "assistant", "content": "No."},
                {"role": "user", "content": [part(), {"type": "text", "text": "Bread?"}, part()]},
                {"role": "assistant", "content": "Yes."},
            ]
        )
        assert (verdict.request.label, verdict.response.label) == ("unharmful", "unharmful")
        assert engine.requests[0].messages[1].text == (
            f"Human user:\n{IMAGE}\nA {BAD}?\n\nAI assistant:\nNo.\n\n"
            f"Human user:\n{IMAGE}\n{IMAGE}\nBread?\n\nAI assistant:\nYes.\n"
        )
        assert len(engine.requests[0].images) == 3

    @pytest.mark.parametrize("messages", [[], [{"role": "user", "content": 5}], [{"role": "robot"}], "hello", None])
    def test_bad_messages_are_error_verdicts(self, messages: Any) -> None:
        assert_error(Guard(Recording()).moderate_messages(messages), "invalid_input")

    async def test_async(self) -> None:
        guard = Guard(Recording())
        messages = [{"role": "user", "content": f"A {BAD}"}]
        assert await guard.amoderate_messages(messages) == guard.moderate_messages(messages)
        assert_error(await guard.amoderate_messages([]), "invalid_input")


class TestBatch:
    def test_it_reads_chunk_by_chunk_and_keeps_the_order(self) -> None:
        read: list[int] = []

        def items() -> Iterator[dict[str, Any]]:
            for number in range(10):
                read.append(number)
                yield {"prompt": f"{BAD if number % 3 == 0 else 'bread'} {number}"}

        engine = Recording()
        verdicts = Guard(engine).moderate_batch(items(), chunk=4)
        assert read == []
        assert next(verdicts).flagged is True
        assert read == [0, 1, 2, 3]
        rest = list(verdicts)
        assert [verdict.flagged for verdict in rest] == [number % 3 == 0 for number in range(1, 10)]
        assert engine.calls == [("generate", 4), ("generate", 4), ("generate", 2)]

    def test_all_calls_of_a_round_come_together(self) -> None:
        def scores(request: EngineRequest, slot: str) -> tuple[float, ...]:
            return scoring(0.5 if "maybe" in request.messages[1].text else 0.01, 0.01)(request, slot)

        engine = Recording(scores=scores)
        items = [{"prompt": word} for word in ("maybe a", "sure b", "maybe c", "sure d")]
        verdicts = list(Guard(engine).moderate_batch(items, mode="hybrid"))
        assert engine.calls == [("score", 4), ("generate", 2)]
        assert [verdict.reasoning is not None for verdict in verdicts] == [True, False, True, False]

    def test_truncated_ones_are_retried_together(self) -> None:
        def cut(request: EngineRequest) -> EngineResult | str:
            return EngineResult("<think>", "length") if request.max_new_tokens < 100 else labels(request)

        engine = Recording(cut)
        guard = Guard(engine, Policy(max_new_tokens=10, retry_new_tokens=100))
        assert {verdict.action for verdict in guard.moderate_batch([{"prompt": "x"}] * 5)} == {"allow"}
        assert engine.calls == [("generate", 5), ("generate", 5)]

    def test_bad_items_stop_nobody(self) -> None:
        bad: list[Any] = [
            {},
            {"prompt": ""},
            {"prompt": 5},
            {"images": "a.png"},
            {"images": {}},
            {"images": False},
            {"images": ["/no/such.png"]},
            {"messages": 3},
            {"messages": [], "prompt": None},
            {"messages": [{"role": "user", "content": "x"}], "prompt": "y"},
            {"messages": [{"role": "user", "content": "x"}], "images": ["y"]},
            "text",
            None,
            17,
            {"prompt": "x", "images": [b"GIF89a broken"]},
        ]
        good = {"prompt": "bread"}
        engine = Recording()
        items = [item for pair in zip([good] * len(bad), bad, strict=True) for item in pair]
        verdicts = list(Guard(engine).moderate_batch(items))
        assert [verdict.action for verdict in verdicts[::2]] == ["allow"] * len(bad)
        for verdict in verdicts[1::2]:
            assert verdict.error is not None
            assert_error(verdict, verdict.error.code)
            assert verdict.error.code in ("invalid_input", "invalid_image")
        assert engine.calls == [("generate", len(bad))]

    def test_rows_and_exchanges(self) -> None:
        items: list[Any] = [
            Exchange(f"A {BAD}"),
            {"id": 7, "prompt": "bread", "images": [png()], "response": None, "messages": None},
            {"messages": [{"role": "user", "content": f"A {BAD}"}]},
            Exchange("bread", history=(Turn(f"A {BAD}"),)),
        ]
        assert [verdict.flagged for verdict in Guard(Recording()).moderate_batch(items)] == [True, False, True, False]

    def test_no_items(self) -> None:
        assert list(Guard(Recording()).moderate_batch([])) == []

    def test_two_batches_at_once(self) -> None:
        guard = Guard(Recording())
        first = guard.moderate_batch(({"prompt": BAD} for _ in range(3)), chunk=1)
        second = guard.moderate_batch(({"prompt": "bread"} for _ in range(3)), chunk=1)
        pairs = [(a.flagged, b.flagged) for a, b in zip(first, second, strict=True)]
        assert pairs == [(True, False)] * 3


class Faulty(Recording):
    """Raises what an engine should not raise, where a request says so."""

    def __init__(self, fault: Exception, **values: Any) -> None:
        super().__init__(labels, **values)
        self.fault = fault

    def _check(self, requests: Sequence[EngineRequest]) -> None:
        if any("poison" in request.messages[1].text for request in requests):
            raise self.fault

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        self._check(requests)
        return super().generate(requests)

    def score(self, requests: Sequence[EngineRequest], *rest: Any) -> list[ScoreResult]:
        self._check(requests)
        return super().score(requests, *rest)

    async def agenerate(self, request: EngineRequest) -> EngineResult:
        self._check([request])
        return await super().agenerate(request)

    async def ascore(self, request: EngineRequest, *rest: Any) -> ScoreResult:
        self._check([request])
        return await super().ascore(request, *rest)


FAULTS = [EngineError("time-out"), RuntimeError("secret"), MemoryError(), TimeoutError("secret"), KeyError("secret")]


class TestEngineFaults:
    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
    @pytest.mark.parametrize("mode", ["slow", "fast", "hybrid"])
    def test_a_fault_is_an_error_verdict_and_harms_no_other(self, fault: Exception, mode: Any) -> None:
        guard = Guard(Faulty(fault, scores=scoring(0.01)))
        items = [{"prompt": word} for word in ("bread", "poison", "kite")]
        first, second, third = guard.moderate_batch(items, mode=mode)
        assert (first.action, third.action) == ("allow", "allow")
        assert_error(second, "engine")
        assert second.error is not None
        assert "secret" not in second.error.message
        assert_error(guard.moderate("poison", mode=mode), "engine")
        lenient = Guard(guard.engine, Policy(on_error="allow"))
        assert_error(lenient.moderate("poison", mode=mode), "engine", "allow")

    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
    async def test_a_fault_in_async(self, fault: Exception) -> None:
        guard = Guard(Faulty(fault, scores=scoring(0.5)))
        for mode in ("slow", "fast", "hybrid"):
            good, bad = await asyncio.gather(
                guard.amoderate("bread", mode=mode),
                guard.amoderate("poison", mode=mode),
            )
            assert good.error is None
            assert_error(bad, "engine")

    def test_an_engine_that_loses_results_is_an_error(self) -> None:
        class Forgetful(Recording):
            def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
                return super().generate(requests)[1:]

        for verdict in Guard(Forgetful()).moderate_batch([{"prompt": "x"}] * 3):
            assert_error(verdict, "engine")

    def test_an_engine_that_answers_something_else_is_an_error(self) -> None:
        class Confused(Recording):
            def generate(self, requests: Sequence[EngineRequest]) -> Any:
                return [None for _ in requests]

        assert_error(Guard(Confused()).moderate("x"), "engine")

    def test_an_error_result_keeps_its_code(self) -> None:
        engine = Recording([EngineResult("", "error", error="too long by 7", error_code="input_too_long")])
        verdict = Guard(engine).moderate("x")
        assert_error(verdict, "input_too_long")
        assert verdict.error is not None
        assert verdict.error.message == "too long by 7"

    def test_interrupts_pass(self) -> None:
        class Interrupted(Recording):
            def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Guard(Interrupted()).moderate("x")

    def test_content_stays_out_of_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            Guard(Faulty(RuntimeError("canary"))).moderate("poison canary")
        assert "RuntimeError" in caplog.text
        assert "canary" not in caplog.text


class TestAsync:
    async def test_many_at_once_equal_one_by_one(self) -> None:
        guard = Guard(Recording(scores=scoring(0.5)))
        prompts = [f"{BAD if number % 2 else 'bread'} {number}" for number in range(12)]
        modes: list[Any] = ["slow", "fast", "hybrid"]
        verdicts = await asyncio.gather(
            *(guard.amoderate(prompt, response="y", mode=modes[at % 3]) for at, prompt in enumerate(prompts))
        )
        expected = [guard.moderate(prompt, response="y", mode=modes[at % 3]) for at, prompt in enumerate(prompts)]
        assert verdicts == expected

    async def test_calls_overlap_and_do_not_block_the_loop(self) -> None:
        class Slow(Recording):
            together = most = 0

            async def agenerate(self, request: EngineRequest) -> EngineResult:
                self.together += 1
                self.most = max(self.most, self.together)
                await asyncio.sleep(0.05)
                self.together -= 1
                return await super().agenerate(request)

        engine = Slow()
        await asyncio.gather(*(Guard(engine).amoderate("x", images=[png()]) for _ in range(5)))
        assert engine.most > 1

    async def test_bad_input_is_an_error_verdict(self) -> None:
        guard = Guard(Recording())
        assert_error(await guard.amoderate(), "invalid_input")
        assert_error(await guard.amoderate(images=[b"no image"]), "invalid_image")
        wrong: Any = "quick"
        with pytest.raises(InputError, match="unknown mode"):
            await guard.amoderate("x", mode=wrong)

    async def test_windows(self) -> None:
        from tests.judging.test_judge import BENIGN, PHRASE, CountingEngine, finds_phrase

        guard = Guard(CountingEngine(finds_phrase, limit=2048), Policy(long_input="windows"))
        assert (await guard.amoderate(BENIGN * 100 + PHRASE)).flagged is True

    async def test_cancelling_ends_the_call_and_nothing_else(self) -> None:
        class Stuck(Recording):
            started = asyncio.Event()

            async def agenerate(self, request: EngineRequest) -> EngineResult:
                if "stuck" in request.messages[1].text:
                    self.started.set()
                    await asyncio.Event().wait()
                return await super().agenerate(request)

        engine = Stuck()
        guard = Guard(engine)
        task = asyncio.create_task(guard.amoderate("stuck"))
        other = asyncio.create_task(guard.amoderate(BAD))
        await engine.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await other).flagged is True
        assert (await guard.amoderate("bread")).action == "allow"

    async def test_a_deadline_ends_the_call(self) -> None:
        class Stuck(Recording):
            async def agenerate(self, request: EngineRequest) -> EngineResult:
                await asyncio.sleep(60)
                raise AssertionError

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Guard(Stuck()).amoderate("x"), 0.05)


def test_an_exhausted_script_is_an_error_and_never_allow() -> None:
    verdicts: list[Verdict] = list(Guard(ScriptedEngine([answer()])).moderate_batch([{"prompt": "x"}] * 2))
    assert verdicts[0].action == "allow"
    assert_error(verdicts[1], "engine")
