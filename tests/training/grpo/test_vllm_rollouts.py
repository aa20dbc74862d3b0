"""RL with vLLM as the sampler, over stand-ins for its server and its class: tokens, weights, checks, a dead server."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from guardreasoner_vl.engines.adapter import adapter_parameters, merge_adapter
from guardreasoner_vl.engines.openai import http
from guardreasoner_vl.engines.qwen import Encoded, QwenInputs
from guardreasoner_vl.errors import DataError, EngineError
from guardreasoner_vl.recipe import parse_recipe
from guardreasoner_vl.stages import grpo
from guardreasoner_vl.training.grpo import vllm_rollouts
from guardreasoner_vl.training.grpo.ranks import DistributedContext
from guardreasoner_vl.training.grpo.vllm_rollouts import VLLMSampler, present_weights
from guardreasoner_vl.training.lora import load_trainable
from guardreasoner_vl.training.model_folder import load_for_training
from tests.engines import fake_vllm
from tests.engines.fake_vllm_server import FakeVLLMServer
from tests.tiny_model import set_weight, write_tiny_model
from tests.training.grpo import toy_grpo
from tests.training.grpo.toy_grpo import (
    STEPS,
    assert_equal,
    assert_same_end,
    checkpoints,
    log,
    parameters,
    weights,
)
from tests.training.grpo.toy_grpo import recipe as toy_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guardreasoner_vl.recipe import Recipe
    from guardreasoner_vl.training.grpo.rollouts import RolloutGroup

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
ALIKE = 0.02
"""More than the log-probabilities of the same weights differ by, less than those of other weights."""
MADE_UP = 4  # rows of the check at the start
BATCH = 4  # prompts of a rollout batch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_grpo.write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module", autouse=True)
def made_up() -> Iterator[None]:
    with toy_grpo.made_up() as patch:
        patch.setattr(http, "BACKOFF_SECONDS", 0.01)
        yield


@pytest.fixture
def certain(tmp_path: Path) -> Path:
    """A model that is more certain than a random one, so that wrong weights or positions show."""
    model = write_tiny_model(tmp_path / "certain")
    set_weight(model, "model.norm", 8.0)
    return model


def break_weights(server: FakeVLLMServer, part: str) -> None:
    """Change the server's weights whose names hold `part`."""
    with torch.no_grad():
        for name, weight in server.llm.weights.items():
            if part in name:
                weight.mul_(-3)


@pytest.fixture
def served(tiny_model: Path) -> Iterator[FakeVLLMServer]:
    with FakeVLLMServer(tiny_model) as server:
        yield server


def recipe(server: FakeVLLMServer, cap: float | None = None, **section: Any) -> Recipe:
    """The toy recipe with the server, and without its validation, which reads the network itself."""
    rollouts = {"engine": "vllm-server", "base_url": server.url, "importance_cap": cap}
    return toy_recipe(rollouts=rollouts, **{"evaluate_every": None, **section})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path, made_up: None) -> Path:
    """A finished run with a server, whose own record is in `requests`."""
    out = tmp_path_factory.mktemp("served")
    with FakeVLLMServer(tiny_model) as server:
        grpo.run(recipe(server), tiny_model, data, out)
        assert len(server.requests) == MADE_UP + STEPS * BATCH  # each prompt once for its group
        assert {sent["sampling_params"]["n"] for sent in server.requests[MADE_UP:]} == {toy_recipe().grpo.group_size}
        assert server.paths.count("/collective_rpc") == STEPS  # before each rollout batch
    return out


def test_the_log_tells_how_far_the_sampler_is_from_the_trainer(uninterrupted: Path) -> None:
    rows = log(uninterrupted)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:  # the stand-in computes as the trainer does, but never draws tokens of images: four of 700
        assert 1e-3 < row["sampler_gap"] < row["sampler_gap_p99"] < ALIKE
        assert 0.9999 < row["effective_samples"] < 1


def test_the_server_samples_with_the_trainer_s_weights(
    served: FakeVLLMServer, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    """What it has at the end are the weights of before the last rollout batch."""
    start = {name: weight.detach().clone() for name, weight in served.llm.weights.items()}
    grpo.run(recipe(served, save_every=1, steps=2), tiny_model, data, tmp_path)
    sent = weights(tmp_path, 1)
    assert_equal(served.llm.weights, sent)
    assert any(not torch.equal(start[name], sent[name]) for name in sent)
    assert not (tmp_path / "grpo" / "vllm-weights").exists()


@pytest.mark.parametrize("batches", [1, 2])
def test_a_server_that_dies_leaves_a_checkpoint_to_resume_from(
    batches: int, uninterrupted: Path, served: FakeVLLMServer, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    """A checkpoint of after the last whole rollout batch, though `save_every` is 2; another server goes on with it."""
    served.dies_after = MADE_UP + batches * BATCH + 1
    with pytest.raises(EngineError, match=r"cannot reach .*: run the same command to resume from the last checkpoint"):
        grpo.run(recipe(served), tiny_model, data, tmp_path)
    assert checkpoints(tmp_path) == [batches]
    with FakeVLLMServer(tiny_model) as other:
        grpo.run(recipe(other), tiny_model, data, tmp_path)
    assert_same_end(tmp_path, uninterrupted)


def test_a_server_that_is_not_there_is_an_error_at_once(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with FakeVLLMServer(tiny_model) as gone:
        pass
    with pytest.raises(EngineError, match=r"cannot reach http://127\.0\.0\.1:\d+ "):
        grpo.run(recipe(gone), tiny_model, data, tmp_path)


def test_vllm_is_released_if_there_are_too_few_rows(
    served: FakeVLLMServer, tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = list[VLLMSampler]()
    release = VLLMSampler.close

    def close(vllm: VLLMSampler) -> None:
        released.append(vllm)
        release(vllm)

    monkeypatch.setattr(VLLMSampler, "close", close)
    with pytest.raises(DataError, match="rows can be trained on"):
        grpo.run(recipe(served, rollout_batch=4096, update_batch=2048), tiny_model, data, tmp_path)
    assert len(released) == 1


def test_an_empty_address_does_not_start_vllm_in_the_process(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    rollouts = {"engine": "vllm-server", "base_url": ""}
    with pytest.raises(EngineError, match="base_url is not a web address"):
        grpo.run(toy_recipe(rollouts=rollouts), tiny_model, data, tmp_path)


def test_a_server_without_room_for_a_prompt_is_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with (
        FakeVLLMServer(tiny_model, max_model_len=16) as served,
        pytest.raises(EngineError, match=r"context of 16 tokens leaves no room .* grpo\.max_completion_length 16"),
    ):
        grpo.run(recipe(served), tiny_model, data, tmp_path)


def sampler(model: Path, inputs: QwenInputs, recipe: Recipe, folder: Path) -> VLLMSampler:
    network = load_for_training(model, "fp32")
    return VLLMSampler(network, model, inputs, recipe.grpo, DistributedContext(), folder)


def test_a_rank_that_disagrees_with_vllm_computes_all_rows_first(
    served: FakeVLLMServer, tiny_model: Path, inputs: QwenInputs, tmp_path: Path
) -> None:
    """Other ranks may share its weights, and would wait for it."""
    seen: list[str] = []

    def far_off(groups: Sequence[RolloutGroup]) -> torch.Tensor:
        seen.extend(group.sample.id for group in groups)
        return torch.tensor([-90.0]).repeat(sum(len(rollout.ids) for group in groups for rollout in group.completions))

    vllm = sampler(tiny_model, inputs, recipe(served), tmp_path)
    with pytest.raises(EngineError, match="its answers to a text differ from the trainer's by"):
        vllm.check(far_off)
    vllm.close()
    assert [seen.count(name) for name in set(seen)] == [2] * MADE_UP  # by both kinds of positions


def test_a_rank_whose_vllm_fails_takes_part_in_gathering_the_other_weights(
    tiny_model: Path, inputs: QwenInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, gathered = fake_vllm.install(monkeypatch), list[str]()
    vllm = sampler(tiny_model, inputs, toy_recipe(rollouts={"engine": "vllm-colocate"}), tmp_path)
    (llm,) = opened

    def gathering(*arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in present_weights(*arguments):
            gathered.append(name)
            yield name, weight

    def fail(method: str, kwargs: Any) -> None:
        next(kwargs["weights_iterator"])
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vllm_rollouts, "present_weights", gathering)
    monkeypatch.setattr(llm, "collective_rpc", fail)
    with pytest.raises(EngineError, match="vLLM did not take the weights"):
        vllm.renew(0)
    assert len(gathered) == len(llm.weights)


def test_images_in_another_size_are_refused_before_the_first_batch(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    with (
        FakeVLLMServer(tiny_model, mm_processor_kwargs={"max_pixels": 56 * 56}) as served,
        pytest.raises(EngineError, match="vLLM read the prompt as"),
    ):
        grpo.run(recipe(served), tiny_model, data, tmp_path)
    assert len(served.requests) == MADE_UP
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize(("broken", "answers"), [("language_model.norm", "a text"), ("visual.merger", "an image")])
def test_other_weights_are_refused_before_the_first_batch(
    broken: str, answers: str, certain: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that says that it has loaded the weights and has not."""
    with FakeVLLMServer(certain) as served:

        def load_others(method: str, kwargs: Any) -> None:
            break_weights(served, broken)

        monkeypatch.setattr(served.llm, "collective_rpc", load_others)
        with pytest.raises(EngineError, match=f"answers to {answers} differ from the trainer's by"):
            grpo.run(recipe(served), certain, data, tmp_path / "run")
        assert len(served.requests) == MADE_UP


def test_other_positions_are_refused_before_the_first_batch(
    certain: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes an image's rows for its columns reads as many tokens, and the same ones."""
    encoded = QwenInputs.encoded

    def exchanged(inputs: QwenInputs, ids: list[int], grids: Any) -> Encoded:
        prompt = encoded(inputs, ids, grids)
        return replace(prompt, positions=prompt.positions[[0, 2, 1]])

    with FakeVLLMServer(certain) as served:
        monkeypatch.setattr(served.llm.inputs, "encoded", MethodType(exchanged, served.llm.inputs))
        with pytest.raises(EngineError, match="answers to an image are those of an image whose rows and columns"):
            grpo.run(recipe(served), certain, data, tmp_path / "run")
        assert len(served.requests) == MADE_UP


def test_a_first_batch_by_other_weights_ends_the_run(
    certain: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose weights go bad after the check."""
    check = VLLMSampler.check
    with FakeVLLMServer(certain) as served:

        def then_broken(sampler: VLLMSampler, log_probabilities: Any) -> None:
            check(sampler, log_probabilities)
            break_weights(served, "language_model.norm")

        monkeypatch.setattr(VLLMSampler, "check", then_broken)
        with pytest.raises(EngineError, match="its first rollout batch differ from the trainer's by"):
            grpo.run(recipe(served), certain, data, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == []


def test_a_sampler_s_weights_change_the_update(
    uninterrupted: Path, served: FakeVLLMServer, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    """With a cap far below 1 every token counts that much less, and the norm of the gradient says so."""
    grpo.run(recipe(served, cap=0.125, steps=1), tiny_model, data, tmp_path)
    (capped, *_), (free, *_) = log(tmp_path), log(uninterrupted)
    assert capped["reward"] == free["reward"]
    assert capped["gradient_norm"] < free["gradient_norm"] / 4


def test_vllm_in_the_process_gets_the_weights_as_tensors(
    uninterrupted: Path, tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = fake_vllm.install(monkeypatch)
    section = {"engine": "vllm-colocate", "gpu_memory_utilization": 0.3}
    grpo.run(toy_recipe(rollouts=section, evaluate_every=None), tiny_model, data, tmp_path)
    (llm,) = opened
    assert (llm.gpu_memory_utilization, llm.logprobs_mode) == (0.3, "processed_logprobs")
    assert llm.max_model_len == 120 + 16  # the longest prompt and the longest answer
    assert [len(prompts) for prompts in llm.calls] == [MADE_UP, *[BATCH] * STEPS]
    assert_same_end(tmp_path, uninterrupted)


def test_vllm_in_the_process_computes_in_its_own_precision(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`precision: bf16` has the trainer's passes cast; the rollouts are to be as the check at the start is."""
    fake_vllm.install(monkeypatch)
    casting, generate = list[bool](), fake_vllm.LLM.generate

    def noting(llm: fake_vllm.LLM, *arguments: Any, **settings: Any) -> Any:
        casting.append(torch.is_autocast_enabled("cpu"))
        return generate(llm, *arguments, **settings)

    monkeypatch.setattr(fake_vllm.LLM, "generate", noting)
    section = {"rollouts": {"engine": "vllm-colocate"}, "precision": "bf16", "steps": 1, "evaluate_every": None}
    grpo.run(toy_recipe(**section), tiny_model, data, tmp_path)
    assert casting == [False, False]


def test_two_ranks_ask_about_their_rows_and_one_sends_the_weights(
    uninterrupted: Path, served: FakeVLLMServer, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    work = ["-m", "tests.training.grpo.vllm_worker", *map(str, (tiny_model, data, tmp_path)), served.url]
    ended = subprocess.run(
        [*torchrun, *work], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert len(served.requests) == 2 * MADE_UP + STEPS * BATCH
    assert served.paths.count("/collective_rpc") == STEPS
    for row, wanted in zip(log(tmp_path), log(uninterrupted), strict=True):
        assert row["reward"] == pytest.approx(wanted["reward"], rel=1e-3)
        assert row["sampler_gap_p99"] < ALIKE  # both ranks' answers are by the trainer's weights
    apart = {name: (weights(tmp_path)[name] - value).abs().max() for name, value in weights(uninterrupted).items()}
    assert max(apart.values()) < 0.02 * toy_recipe().grpo.learning_rate * 2 * STEPS


def test_validation_asks_vllm_too(
    served: FakeVLLMServer, tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guardreasoner_vl.corpus.store import read_corpus
    from guardreasoner_vl.training.grpo.validation import validate

    monkeypatch.setattr(grpo, "validate", validate)
    rows = list(read_corpus(data))
    grpo.run(recipe(served, steps=1, evaluate_every=1, evaluate_rows=3), tiny_model, data, tmp_path, rows)
    assert [row["validation"]["tokens"] > 1 for row in log(tmp_path)] == [True, True]
    greedy = [sent for sent in served.requests if sent["sampling_params"]["temperature"] == 0]
    assert len(greedy) >= 6
    assert served.paths.count("/collective_rpc") == 2  # row 0 and the first batch have the same weights


def test_adapters_are_sent_merged(tiny_model: Path) -> None:
    lora = {"rank": 2, "alpha": 4, "targets": ["q_proj", "visual.attn.proj"]}
    model = load_trainable(tiny_model, parse_recipe({"name": "toy", "lora": lora}), "grpo")
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 4)
    start = parameters(tiny_model)
    sent = dict(present_weights(model, torch.bfloat16))
    merge_adapter(model)
    assert_equal(sent, dict(model.named_parameters()))
    moved = {name.split(".")[-2] for name in sent if not torch.equal(sent[name], start[name].bfloat16())}
    assert moved == {"q_proj", "proj"}
