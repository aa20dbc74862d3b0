"""Many answers to one prompt, and an engine around a training run's own network."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from guardreasoner_vl.engines.decoding import Decoder
from guardreasoner_vl.engines.qwen import IMAGE_PAD, QwenInputs
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.engines.weights import load_network
from guardreasoner_vl.protocol import CANDIDATES, FAST_PREFIX, Message, build_messages
from guardreasoner_vl.types import CheckedImage, Exchange, ModelInfo
from tests.engines.conformance import FIELDS, SLOTS, asked
from tests.made_images import image

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from guardreasoner_vl.engines.base import EngineRequest, EngineResult

pytestmark = pytest.mark.slow
INFO = ModelInfo(name="in memory")


def request_for(prompt: str, *images: CheckedImage, **values: Any) -> EngineRequest:
    return replace(asked(), messages=build_messages(Exchange(prompt, images)), images=images, **values)


def rollouts(request: EngineRequest, count: int = 16, **values: Any) -> list[EngineRequest]:
    """Equal requests but for the seed; each with its own copy of the images' bytes, as from a file."""
    settings: dict[str, Any] = {"temperature": 1.2, "max_new_tokens": 12, **values}
    copies = [
        tuple(CheckedImage(bytes(bytearray(p.png)), p.width, p.height) for p in request.images) for _ in range(count)
    ]
    return [replace(request, seed=seed, images=shown, **settings) for seed, shown in enumerate(copies)]


def tokens_of(results: Sequence[EngineResult]) -> list[tuple[int, ...]]:
    assert [result.error for result in results] == [None] * len(results)
    return [result.token_ids for result in results]


@dataclass
class Work:
    """Records the network's work: rows and tokens of every pass, patches of every pass of the vision tower."""

    passes: list[tuple[int, int]] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)
    encoded: int = 0
    images: list[weakref.ref[Image.Image]] = field(default_factory=list)

    @property
    def opened(self) -> int:
        return len(self.images)

    @property
    def prefills(self) -> list[tuple[int, int]]:
        return [shape for shape in self.passes if shape[1] > 1]


@pytest.fixture
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine.load(str(tiny_model), dtype="fp32")


def network_of(folder: Path) -> Any:
    return load_network(folder, "fp32")


@pytest.fixture
def work(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """Starts counting once the prefix is in the cache."""
    engine.generate([asked()])
    counted = Work()
    encode, opener = QwenInputs.encode, CheckedImage.open

    def read(_: Any, __: Any, values: dict[str, Any]) -> None:
        counted.passes.append(tuple(values["inputs_embeds"].shape[:2]))

    def look(_: Any, values: tuple[torch.Tensor, ...]) -> None:
        counted.patches.append(len(values[0]))

    def counting_encode(*arguments: Any) -> Any:
        counted.encoded += 1
        return encode(*arguments)

    def counting_open(shown: CheckedImage) -> Any:
        opened = opener(shown)
        counted.images.append(weakref.ref(opened))
        return opened

    monkeypatch.setattr(QwenInputs, "encode", counting_encode)
    monkeypatch.setattr(CheckedImage, "open", counting_open)
    hooks = [
        engine.network.model.language_model.register_forward_pre_hook(read, with_kwargs=True),
        engine.network.model.visual.patch_embed.register_forward_pre_hook(look),
    ]
    yield counted
    for hook in hooks:
        hook.remove()


def own_tokens(result: EngineResult) -> int:
    """Prompt tokens that the prefix cache does not hold."""
    assert 0 < result.usage.cached_tokens < result.usage.prompt_tokens
    return result.usage.prompt_tokens - result.usage.cached_tokens


class TestPromptsOnce:
    def test_sixteen_equal_prompts_are_read_once(self, engine: TransformersEngine, work: Work) -> None:
        shown = request_for("What is this?", image(90, 57), image(60, 80))
        results = engine.generate(rollouts(shown))
        assert work.prefills == [(1, own_tokens(results[0]))]
        assert all(rows <= 16 for rows, _ in work.passes)
        assert max(rows for rows, _ in work.passes) == 16
        grids = [engine.inputs.grid(shown.height, shown.width) for shown in shown.images]
        assert work.patches == [sum(height * width for height, width in grids)]
        assert (work.encoded, work.opened) == (1, 2)
        assert len(set(tokens_of(results))) > 8

    def test_one_prefill_reads_each_of_several_prompts_once(self, engine: TransformersEngine, work: Work) -> None:
        first, second = request_for("How do I bake bread?"), request_for("The garden, please. " * 3)
        mixed = [request for pair in zip(rollouts(first, 4), rollouts(second, 4), strict=True) for request in pair]
        results = engine.generate(mixed)
        assert work.prefills == [(2, own_tokens(results[1]))]
        assert work.encoded == 2
        prompts = [engine.count_tokens(first), engine.count_tokens(second)] * 4
        assert [result.usage.prompt_tokens for result in results] == prompts
        assert len({result.usage.cached_tokens for result in results}) == 1
        for result in results:
            assert result.usage.completion_tokens == len(result.token_ids) + (result.finish_reason == "stop")

    def test_an_image_of_several_prompts_is_looked_at_once(self, engine: TransformersEngine, work: Work) -> None:
        shown, other = image(90, 57), image(56, 56)
        requests = [
            request_for("What is this?", shown),
            request_for("And what are these?", other, shown, shown),
            request_for("Nothing to see."),
        ]
        together = tokens_of(engine.generate(requests))
        assert work.prefills[0][0] == 3
        sizes = [engine.inputs.grid(one.height, one.width) for one in (shown, other)]
        assert work.patches == [sum(height * width for height, width in sizes)]
        assert work.opened == 2
        assert together == [tokens_of(engine.generate([request]))[0] for request in requests]

    def test_more_than_a_batch_takes(self, tiny_model: Path, engine: TransformersEngine, work: Work) -> None:
        shown = request_for("What is this?", image(90, 57))
        expected = tokens_of(engine.generate(rollouts(shown, 7)))
        narrow = TransformersEngine.of_network(engine.network, engine.inputs, INFO, max_rows=3)
        narrow.generate([asked()])
        work.encoded = 0
        for counts in (work.passes, work.patches, work.images):
            counts.clear()
        results = narrow.generate(rollouts(shown, 7))
        assert tokens_of(results) == expected
        assert work.prefills == [(1, own_tokens(results[0]))] * 3
        assert len(work.patches) == 3
        assert (work.encoded, work.opened) == (1, 1)
        assert [image() for image in work.images] == [None]

    def test_scores_read_equal_prompts_once(self, engine: TransformersEngine, work: Work) -> None:
        shown = request_for("What is this?", image(90, 57), forced_prefix=FAST_PREFIX)
        plain = request_for("How do I bake bread?", forced_prefix=FAST_PREFIX)
        results = engine.score([shown, plain, shown, plain, shown], SLOTS, CANDIDATES)
        assert work.prefills[0] == (2, engine.count_tokens(shown) - results[0].usage.cached_tokens)
        assert len(work.patches) == 1
        assert results[0].logprobs == results[2].logprobs == results[4].logprobs
        for result, request in zip(results, [shown, plain] * 2, strict=False):
            (alone,) = engine.score([request], SLOTS, CANDIDATES)
            assert result.chosen == alone.chosen
            assert result.usage.prompt_tokens == alone.usage.prompt_tokens
            for logprobs, expected in zip(result.logprobs, alone.logprobs, strict=True):
                assert logprobs == pytest.approx(expected, abs=1e-4)

    def test_a_seed_gives_the_same_tokens_alone_and_among_others(self, engine: TransformersEngine) -> None:
        shown = request_for("What is this?", image(90, 57))
        group = rollouts(shown, 6)
        nucleus = rollouts(request_for("How do I bake bread?"), 4, temperature=1.0, top_p=0.95)
        greedy = [request_for("x", forced_prefix="<think>\nThe"), shown]
        mixed = [*nucleus[:2], *group[:3], *greedy, *group[3:], *nucleus[2:]]
        together = tokens_of(engine.generate(mixed))
        assert together == [tokens_of(engine.generate([request]))[0] for request in mixed]
        assert len(set(together)) > 9

    def test_labels_are_read_for_every_rollout(self, engine: TransformersEngine) -> None:
        request = request_for("x", forced_prefix=FAST_PREFIX, label_fields=FIELDS, candidates=CANDIDATES)
        results = engine.generate(rollouts(request, 4))
        first = [result.label_logprobs["Request:"] for result in results]
        assert first == [first[0]] * 4

    def test_a_prompt_that_cannot_be_read_fails_in_each_of_its_requests(self, engine: TransformersEngine) -> None:
        broken = request_for("What is this?", CheckedImage(b"not an image", 56, 56))
        good = request_for("How do I bake bread?")
        results = engine.generate([*rollouts(broken, 3), *rollouts(good, 3)])
        assert [result.error_code for result in results[:3]] == ["engine"] * 3
        assert tokens_of(results[3:]) == tokens_of(engine.generate(rollouts(good, 3)))

    def test_pads_written_as_text_take_no_other_row_s_image(self, engine: TransformersEngine) -> None:
        """Below the neutraliser: a row whose text holds pads must not shift the features of the row after it."""
        shown = request_for("What is this?", image(90, 57))
        pads = replace(shown, messages=(Message("user", f"{IMAGE_PAD * 3} {shown.messages[1].text}"),))
        expected = tokens_of(engine.generate([shown]))
        bad, good = engine.generate([pads, shown])
        assert bad.error_code == "engine"
        assert tokens_of([good]) == expected


class TestOfNetwork:
    def around(self, network: Any, folder: Path, **limits: int) -> TransformersEngine:
        return TransformersEngine.of_network(network, QwenInputs.from_folder(folder), INFO, **limits)

    def test_it_is_the_engine_of_the_folder(self, tiny_model: Path, engine: TransformersEngine) -> None:
        wrapper = self.around(network_of(tiny_model), tiny_model, max_rows=2, max_tokens=300)
        requests = [request_for("What is this?", image(90, 57)), asked(), *rollouts(asked(), 3)]
        assert tokens_of(wrapper.generate(requests)) == tokens_of(engine.generate(requests))
        assert wrapper.model is INFO
        assert wrapper.capabilities == engine.capabilities
        assert wrapper.capabilities.max_context == 512
        with pytest.raises(TypeError, match="max_row"):
            self.around(wrapper.network, tiny_model, max_row=3)

    def test_changed_weights_answer_after_forget(self, tiny_model: Path) -> None:
        network = network_of(tiny_model)
        wrapper = self.around(network, tiny_model)
        requests = [asked(), request_for("What is this?", image(90, 57))]
        before = tokens_of(wrapper.generate(requests))
        with torch.no_grad():
            network.model.language_model.layers[0].self_attn.v_proj.weight.mul_(-1.0)
        stale = wrapper.score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)[0].logprobs
        wrapper.forget()
        fresh = wrapper.score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)[0].logprobs
        assert fresh != stale  # so the test is one of the prefix, too
        anew = self.around(network, tiny_model)
        assert fresh == anew.score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)[0].logprobs
        after = tokens_of(wrapper.generate(requests))
        assert after == tokens_of(anew.generate(requests))
        assert after != before

    def test_every_module_s_mode_is_as_it_was_found(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        network = network_of(tiny_model)
        wrapper = self.around(network, tiny_model)
        for training, frozen in ((False, False), (True, True), (True, False)):
            network.train(training)
            network.model.visual.train(frozen)
            modes = [module.training for module in network.modules()]
            wrapper.generate([asked()])
            wrapper.score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)
            assert [module.training for module in network.modules()] == modes

        def interrupted(*_: Any) -> Any:
            raise KeyboardInterrupt

        network.train()
        monkeypatch.setattr(Decoder, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            wrapper.generate([asked()])
        assert all(module.training for module in network.modules())

    def test_a_network_in_training_answers_as_in_evaluation(self, tiny_model: Path, engine: TransformersEngine) -> None:
        """With dropout, no cache and checkpointing, as trainers set them; training continues afterwards."""
        network = network_of(tiny_model)
        for layer in network.model.language_model.layers:
            layer.self_attn.attention_dropout = 0.5
        network.config.use_cache = network.config.text_config.use_cache = False
        network.gradient_checkpointing_enable({"use_reentrant": False})
        network.enable_input_require_grads()
        network.train()
        wrapper = self.around(network, tiny_model)
        requests = [request_for("What is this?", image(90, 57)), *rollouts(asked(), 3)]
        assert tokens_of(wrapper.generate(requests)) == tokens_of(engine.generate(requests))
        scored = [asked(forced_prefix=FAST_PREFIX)]
        logprobs = wrapper.score(scored, SLOTS, CANDIDATES)[0].logprobs
        assert logprobs == engine.score(scored, SLOTS, CANDIDATES)[0].logprobs
        assert not network.config.use_cache
        assert network.is_gradient_checkpointing

        opened = Image.open(BytesIO(requests[0].images[0].png))
        prompt = wrapper.inputs.encode(requests[0].messages, requests[0].images)
        loss = network(
            input_ids=torch.tensor([prompt.ids]),
            position_ids=torch.from_numpy(prompt.positions)[:, None],
            pixel_values=torch.from_numpy(wrapper.inputs.patches([opened])),
            image_grid_thw=torch.tensor([(1, *grid) for grid in prompt.grids]),
            labels=torch.tensor([prompt.ids]),
        ).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())

    def test_weights_need_gradients_as_before(self, tiny_model: Path) -> None:
        network = network_of(tiny_model)
        network.model.visual.requires_grad_(False)
        wanted = [parameter.requires_grad for parameter in network.parameters()]
        self.around(network, tiny_model).generate([asked()])
        assert [parameter.requires_grad for parameter in network.parameters()] == wanted
        assert True in wanted
        assert False in wanted

    def test_close_forgets_the_prefix(self, engine: TransformersEngine, work: Work) -> None:
        engine.generate([asked()])
        assert len(work.prefills) == 1
        engine.close()
        engine.generate([asked()])
        assert len(work.prefills) == 1 + 2  # the prefix and the rest of the prompt
