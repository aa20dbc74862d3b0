"""A vLLM server in the role of `vllm.LLM`, over a stand-in for its HTTP interface."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.engines.openai import http
from guardreasoner_vl.engines.qwen import IMAGE_PAD, QwenInputs
from guardreasoner_vl.engines.vllm_engine import VLLMEngine
from guardreasoner_vl.engines.vllm_server import VLLMServer
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.types import ModelInfo
from tests.engines import fake_vllm, fake_vllm_server
from tests.engines.conformance import SLOTS, asked, timeless, with_image
from tests.engines.fake_vllm_server import FakeVLLMServer
from tests.engines.test_transformers_engine import mixed
from tests.tiny_model import write_tiny_model
from tests.training.grpo.toy_grpo import assert_equal, parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from guardreasoner_vl.engines.base import EngineRequest


pytestmark = pytest.mark.slow


@pytest.fixture
def served(tiny_model: Path) -> Iterator[FakeVLLMServer]:
    with FakeVLLMServer(tiny_model) as server:
        yield server


@pytest.fixture
def client(served: FakeVLLMServer) -> Iterator[VLLMServer]:
    with VLLMServer(served.url) as server:
        yield server


def engine_of(server: VLLMServer, inputs: QwenInputs) -> VLLMEngine:
    return VLLMEngine(
        server, inputs, ModelInfo(name="served"), 512, parameters=dict, show=lambda image: image, scores=False
    )


def sampling() -> list[EngineRequest]:
    """Texts and images, sampled."""
    return [replace(request, temperature=1.2, seed=7, max_new_tokens=6) for request in mixed()]


def test_a_group_is_asked_for_once_and_answered_as_in_process(
    served: FakeVLLMServer, client: VLLMServer, inputs: QwenInputs, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    beside = VLLMEngine.load(str(tiny_model), max_model_len=512, logprobs_mode="processed_logprobs")
    requests = sampling()
    groups = engine_of(client, inputs).sample(requests, 3)
    for group, wanted in zip(groups, beside.sample(requests, 3), strict=True):
        assert timeless(group) == timeless(wanted)
        assert len({answer.token_ids for answer in group}) > 1
    assert len(served.requests) == len(requests)
    pad = inputs.token_id[IMAGE_PAD]
    for request, sent in zip(requests, sorted(served.requests, key=lambda one: len(one["token_ids"])), strict=False):
        assert sent["sampling_params"]["n"] == 3, request
    images = [len(sent.get("content_parts", ())) for sent in served.requests]
    assert sorted(images) == sorted(len(request.images) for request in requests)
    assert [sent["token_ids"].count(pad) for sent in served.requests] == images


def test_the_log_probabilities_are_those_of_the_sampled_tokens(client: VLLMServer, inputs: QwenInputs) -> None:
    ((answer, *_), *_) = engine_of(client, inputs).sample(sampling(), 2)
    ended = () if answer.end_id is None else (answer.end_id,)
    assert len(answer.token_logprobs) == len((*answer.token_ids, *ended))
    assert all(value < 0 for value in answer.token_logprobs)


def test_greedy_answers_are_those_of_the_engine_in_process(
    client: VLLMServer, inputs: QwenInputs, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    requests = [replace(request, max_new_tokens=8) for request in mixed()]
    answers = engine_of(client, inputs).generate(requests)
    for answer, wanted in zip(answers, VLLMEngine.load(str(tiny_model)).generate(requests), strict=True):
        assert (answer.text, answer.end_id, answer.error) == (wanted.text, wanted.end_id, None)


def test_it_gives_no_scores(client: VLLMServer, inputs: QwenInputs) -> None:
    engine = engine_of(client, inputs)
    assert not engine.capabilities.scores
    assert "no log-probabilities" in (engine.score([asked()], SLOTS, ("a", "b"))[0].error or "")


def test_a_server_that_sees_images_in_another_size_is_refused(tiny_model: Path, inputs: QwenInputs) -> None:
    with (
        FakeVLLMServer(tiny_model, mm_processor_kwargs={"max_pixels": 56 * 56}) as served,
        VLLMServer(served.url) as client,
    ):
        ((image,), (text,)) = engine_of(client, inputs).sample([with_image(asked()), asked()], 1)
    assert "vLLM read the prompt as" in (image.error or "")
    assert text.error is None


def test_weights_come_from_a_folder_and_the_caches_of_the_old_ones_go(
    served: FakeVLLMServer, client: VLLMServer, inputs: QwenInputs, tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    engine = engine_of(client, inputs)
    before = engine.generate([asked()])
    engine.reload(weights_path=str(other))
    assert served.paths == ["/collective_rpc", "/reset_encoder_cache", "/reset_prefix_cache"]
    assert_equal(served.llm.weights, parameters(other))
    assert timeless(engine.generate([asked()])) != timeless(before)


def test_a_busy_server_is_not_taken_for_a_fresh_one(
    served: FakeVLLMServer, client: VLLMServer, inputs: QwenInputs, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(EngineError, match="let no other client use it"):
        engine_of(client, inputs).reload(weights_path=str(tiny_model))


def test_a_server_that_does_not_see_the_folder_is_told_so(
    client: VLLMServer, inputs: QwenInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.01)
    with pytest.raises(EngineError, match=r"failed to load .*elsewhere: it must see this folder under the same path"):
        engine_of(client, inputs).reload(weights_path=str(tmp_path / "elsewhere"))


def test_the_server_s_context_is_known(client: VLLMServer) -> None:
    assert client.checked_context() == 512


def test_a_server_behind_a_proxy_is_asked_below_its_path_with_the_password(
    served: FakeVLLMServer, inputs: QwenInputs
) -> None:
    served.below = "/gpu-1"
    address = served.url.replace("://", "://ada:lovelace@").replace("/v1", "/gpu-1/v1")
    with VLLMServer(address) as client:
        assert client.checked_context() == 512
        assert engine_of(client, inputs).generate([asked()])[0].error is None
    assert set(served.authorizations) == {f"Basic {base64.b64encode(b'ada:lovelace').decode()}"}


def test_log_probabilities_before_the_temperature_are_refused(tiny_model: Path) -> None:
    with (
        FakeVLLMServer(tiny_model, logprobs_mode="raw_logprobs") as served,
        VLLMServer(served.url) as client,
        pytest.raises(EngineError, match="start the server with --logprobs-mode processed_logprobs"),
    ):
        client.checked_context()


def test_a_server_without_the_paths_is_told_how_to_start(
    served: FakeVLLMServer, client: VLLMServer, inputs: QwenInputs, tiny_model: Path
) -> None:
    served.missing = ("/server_info", "/collective_rpc", "/inference/v1/generate")
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
        client.checked_context()
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
        engine_of(client, inputs).reload(weights_path=str(tiny_model))
    assert "--enable-scale-out" in (engine_of(client, inputs).generate([asked()])[0].error or "")


def test_a_dead_server_fails_every_request_at_once(
    served: FakeVLLMServer, client: VLLMServer, inputs: QwenInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.01)
    served.dies_after = 0
    answers = engine_of(client, inputs).generate([asked(), asked("Soup?")])
    assert ["cannot reach" in (answer.error or "") for answer in answers] == [True, True]


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (lambda answer: answer["choices"].pop(), r"malformed \(choices\)"),
        (lambda answer: answer["choices"][0].update(token_ids=[-1]), r"malformed \(choices\.0\.token_ids\.0\)"),
        (lambda answer: answer["choices"][0].update(token_ids=[]), r"malformed \(logprobs\)"),
        (lambda answer: answer["choices"][0]["logprobs"]["content"].pop(), r"malformed \(logprobs\)"),
        (lambda answer: answer["choices"][0].update(logprobs=None), "no log-probabilities of the sampled tokens"),
        (
            lambda answer: answer["choices"][0]["logprobs"]["content"][0].update(logprob=float("nan")),
            "no finite log-probability",
        ),
        (lambda answer: answer.update(prompt_token_ids=None), r"malformed \(prompt_token_ids\)"),
        (lambda answer: answer["prompt_token_ids"].reverse(), "read the prompt as other tokens"),
    ],
)
def test_an_answer_that_rl_cannot_use_is_an_error(
    broken: Callable[[dict[str, Any]], object],
    error: str,
    client: VLLMServer,
    inputs: QwenInputs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generated = fake_vllm_server.generated

    def break_answer(*arguments: Any) -> dict[str, Any]:
        answer = generated(*arguments)
        broken(answer)
        return answer

    monkeypatch.setattr(fake_vllm_server, "generated", break_answer)
    ((answer, _),) = engine_of(client, inputs).sample([replace(asked(), temperature=1.2, seed=7)], 2)
    assert re.search(error, answer.error or "")
