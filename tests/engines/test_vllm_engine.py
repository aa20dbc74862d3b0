"""The vLLM engine over a stand-in for vLLM, with the reference engine as the oracle."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl import Guard
from guardreasoner_vl.engines.int8 import INT8_WEIGHTS
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.engines.vllm_engine import BLOCK_SIZE, VLLMEngine
from guardreasoner_vl.errors import EngineError, MissingExtraError, ModelError
from guardreasoner_vl.images.geometry import PixelBudget
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.protocol import CANDIDATES, FAST_PREFIX
from tests.engines import fake_vllm
from tests.engines.conformance import FIELDS, SLOTS, EngineConformance, Pieces, asked, timeless, with_image
from tests.engines.test_transformers_engine import WITH_COMMON_HEAD, mixed

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.engines.base import Engine, EngineRequest


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[fake_vllm.LLM]:
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def engine(tiny_model: Path) -> VLLMEngine:
    return VLLMEngine.load(str(tiny_model))


@pytest.fixture
def reference(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine.load(str(tiny_model), dtype="fp32")


@pytest.fixture
def llm(engine: VLLMEngine, opened: list[fake_vllm.LLM]) -> fake_vllm.LLM:
    """What the engine runs."""
    (only,) = opened
    return only


class TestVLLM(EngineConformance):
    @pytest.fixture
    def engine(self, tiny_model: Path) -> Engine:
        return VLLMEngine.load(str(tiny_model))


class TestBesideTheReferenceEngine:
    def test_the_answers_are_equal(self, engine: VLLMEngine, reference: TransformersEngine) -> None:
        requests = [replace(request, max_new_tokens=24) for request in mixed()]
        assert timeless(engine.generate(requests)) == timeless(reference.generate(requests))
        assert [engine.count_tokens(request) for request in requests] == list(map(reference.count_tokens, requests))

    def test_a_requests_pixels_decide_the_size_of_its_images(
        self, engine: VLLMEngine, reference: TransformersEngine
    ) -> None:
        small = replace(mixed()[3], pixels=PixelBudget(28 * 28, 56 * 56), max_new_tokens=8)
        (result,) = engine.generate([small])
        assert timeless([result]) == timeless(reference.generate([small]))
        assert result.usage.prompt_tokens < engine.count_tokens(mixed()[3])

    @pytest.mark.parametrize("words", [CANDIDATES, WITH_COMMON_HEAD])
    def test_the_scores_are_equal(
        self, engine: VLLMEngine, reference: TransformersEngine, words: tuple[str, ...]
    ) -> None:
        requests = [replace(request, forced_prefix=FAST_PREFIX) for request in mixed()]
        for got, wanted in zip(
            engine.score(requests, SLOTS, words), reference.score(requests, SLOTS, words), strict=True
        ):
            assert got.chosen == wanted.chosen
            assert got.usage.prompt_tokens == wanted.usage.prompt_tokens
            for values, expected in zip(got.logprobs, wanted.logprobs, strict=True):
                assert values == pytest.approx(expected, abs=1e-3)

    def test_the_labels_of_an_answer_are_scored_where_they_were_generated(
        self, engine: VLLMEngine, reference: TransformersEngine
    ) -> None:
        # The tiny model writes no result block, so the field is forced and the label follows it.
        request = replace(
            asked(forced_prefix="<think>\n</think>\n<result>\nAnswers:\n"),
            label_fields=("",),
            candidates=CANDIDATES,
            max_new_tokens=3,
        )
        answers, theirs = engine.generate([request]), reference.generate([request])
        assert set(answers[0].label_logprobs) == set(theirs[0].label_logprobs)
        for name, values in theirs[0].label_logprobs.items():
            assert answers[0].label_logprobs[name] == pytest.approx(values, abs=1e-3)


@pytest.mark.parametrize("mode", ["slow", "fast", "hybrid"])
def test_a_guard_judges_in_every_mode_as_with_the_reference_engine(tiny_model: Path, mode: Any) -> None:
    rows = [{"prompt": "How do I bake bread?"}, {"prompt": "The garden", "response": "Yes."}]
    policy = Policy(mode=mode, max_new_tokens=24)
    with (
        Guard.load(str(tiny_model), "vllm", policy=policy) as guard,
        Guard.load(str(tiny_model), "transformers", policy=policy, dtype="fp32") as other,
    ):
        for got, wanted in zip(guard.moderate_batch(rows), other.moderate_batch(rows), strict=True):
            assert (got.action, got.request.label if got.request else None) == (
                wanted.action,
                wanted.request.label if wanted.request else None,
            )
            assert (got.error and got.error.code) == (wanted.error and wanted.error.code)


def test_vllm_is_opened_for_a_guard(engine: VLLMEngine, llm: fake_vllm.LLM) -> None:
    assert llm.generation_config == "vllm"
    first, second = engine.generate([asked(), asked("Is tomato soup harmful?")])
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens >= BLOCK_SIZE
    assert second.usage.cached_tokens % BLOCK_SIZE == 0


def test_all_requests_of_a_call_go_to_vllm_together(engine: VLLMEngine, llm: fake_vllm.LLM) -> None:
    engine.generate([asked(), asked("Another?"), with_image(asked())])
    engine.score([asked(forced_prefix=FAST_PREFIX)] * 2, SLOTS, CANDIDATES)
    assert [len(prompts) for prompts in llm.calls] == [3, 2, 2]


def test_a_prompt_that_breaks_the_model_fails_alone(
    engine: VLLMEngine, llm: fake_vllm.LLM, caplog: pytest.LogCaptureFixture
) -> None:
    llm.failing = ["kite"]
    listener = Pieces()
    requests = [asked("Bread?"), asked("A kite?"), replace(asked("Soup?"), listener=listener)]
    with caplog.at_level(logging.INFO):
        results = engine.generate(requests)
    assert [result.error_code if result.error else None for result in results] == [None, "engine", None]
    assert listener.begun == 1
    assert "kite" not in caplog.text
    assert "kite" not in (results[1].error or "")
    scores = engine.score([replace(request, forced_prefix=FAST_PREFIX) for request in requests], SLOTS, CANDIDATES)
    assert [bool(score.error) for score in scores] == [False, True, False]


def test_a_prompt_that_is_too_long_never_reaches_vllm(engine: VLLMEngine, llm: fake_vllm.LLM) -> None:
    long, short = engine.generate([asked("a kite " * 600), asked()])
    assert (long.error_code, short.error) == ("input_too_long", None)
    assert [len(prompts) for prompts in llm.calls] == [1]


def test_the_context_can_be_smaller_than_the_models(tiny_model: Path) -> None:
    engine = VLLMEngine.load(str(tiny_model), max_model_len=64)
    assert engine.capabilities.max_context == 64
    assert engine.generate([asked("a kite " * 64)])[0].error_code == "input_too_long"


@pytest.mark.parametrize("most", [0, 1])
def test_a_cancelled_request_is_an_error(engine: VLLMEngine, llm: fake_vllm.LLM, most: int) -> None:
    """With 0 it is cancelled before it begins, and vLLM never sees it; with 1 while it runs."""
    cancelled, answered = engine.generate([replace(asked(), listener=Pieces(most)), asked()])
    assert (cancelled.error_code, answered.error) == ("cancelled", None)
    assert [len(prompts) for prompts in llm.calls] == [1 + most]


def test_images_of_another_size_are_not_judged(tiny_model: Path) -> None:
    engine = VLLMEngine.load(str(tiny_model), mm_processor_kwargs={"max_pixels": 56 * 56})
    seen, text = engine.generate([with_image(asked()), asked()])
    assert seen.error_code == "engine"
    assert "instead of" in (seen.error or "")
    assert text.error is None
    (score,) = engine.score([with_image(asked(forced_prefix=FAST_PREFIX))], SLOTS, CANDIDATES)
    assert "instead of" in (score.error or "")


def test_answers_to_an_interrupted_call_are_not_taken_for_these(engine: VLLMEngine, llm: fake_vllm.LLM) -> None:
    wanted = engine.generate([asked(), asked("Soup?")])
    llm.leftover = llm.generate([llm.calls[0][1]], [fake_vllm.SamplingParams()], use_tqdm=False)
    assert timeless(engine.generate([asked(), asked("Soup?")])) == timeless(wanted)


def test_an_answer_that_vllm_aborts_is_an_error(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = fake_vllm.LLM.steps
    monkeypatch.setattr(fake_vllm.LLM, "steps", lambda *arguments: [next(steps(*arguments))])
    (result,) = engine.generate([asked()])
    assert result.error_code == "engine"
    assert "ended the answer early" in (result.error or "")


def test_numbers_that_are_not_finite_are_no_scores(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_vllm, "Logprob", lambda _: SimpleNamespace(logprob=math.nan))
    (score,) = engine.score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)
    assert score.error
    (result,) = engine.generate([replace(asked(), label_fields=FIELDS, candidates=CANDIDATES)])
    assert result.finish_reason == "error"


def sampled(seed: int) -> EngineRequest:
    return replace(asked(), temperature=1.0, seed=seed)


def test_a_seed_decides_a_sampled_answer(engine: VLLMEngine) -> None:
    first, again, other = engine.generate([sampled(1), sampled(1), sampled(2)])
    assert first.text == again.text != other.text


def test_a_group_is_read_once_and_its_seeds_count_up(engine: VLLMEngine, llm: fake_vllm.LLM) -> None:
    (group,) = engine.sample([sampled(3)], 3)
    assert [len(prompts) for prompts in llm.calls] == [1]
    apart = engine.generate([sampled(3), sampled(4), sampled(5)])
    assert [answer.text for answer in group] == [answer.text for answer in apart]
    assert all(answer.token_logprobs for answer in group)
    assert not any(answer.token_logprobs for answer in apart)


def test_a_broken_model_fails_all_groups(engine: VLLMEngine, llm: fake_vllm.LLM) -> None:
    llm.failing = ["kite"]
    with pytest.raises(EngineError, match=r"^the model failed \(RuntimeError\): try a smaller input$"):
        engine.sample([asked("Bread?"), asked("A kite?")], 2)


def test_new_weights_answer(engine: VLLMEngine, llm: fake_vllm.LLM) -> None:
    before = engine.generate([asked()])
    engine.reload(weights_iterator=((name, -weight.detach()) for name, weight in list(llm.weights.items())))
    assert timeless(engine.generate([asked()])) != timeless(before)


def test_weights_that_vllm_cannot_take_are_an_error(engine: VLLMEngine) -> None:
    with pytest.raises(EngineError, match="vLLM did not take the weights"):
        engine.reload(weights_path="nowhere")


def test_a_prompt_that_is_read_as_other_tokens_is_an_error(
    engine: VLLMEngine, llm: fake_vllm.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = llm.answer
    monkeypatch.setattr(llm, "answer", lambda prompt, ids, _: answer(prompt, [*ids[:-1], 5], _))
    assert "as other tokens" in (engine.generate([asked()])[0].error or "")


def test_a_closed_engine_answers_nothing(engine: VLLMEngine) -> None:
    engine.close()
    assert "closed" in (engine.generate([asked()])[0].error or "")


def test_without_vllm_the_extra_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for load in (VLLMEngine.load, lambda model: Guard.load(model, "vllm")):
        with pytest.raises(
            MissingExtraError, match=r"^vllm is not installed: install .* extra 'vllm' \(README, Install\)$"
        ):
            load(str(tiny_model))


def test_a_folder_that_vllm_cannot_read_is_named_with_the_remedy(tiny_model: Path, tmp_path: Path) -> None:
    compact = tmp_path / "compact"
    compact.mkdir()
    for path in tiny_model.iterdir():
        (compact / path.name.replace("model.safetensors", INT8_WEIGHTS)).write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match="compact MODEL --expand"):
        VLLMEngine.load(str(compact))
    with pytest.raises(ModelError, match=r"vLLM cannot load it .*unexpected keyword"):
        VLLMEngine.load(str(tiny_model), tensor_paralel_size=2)
