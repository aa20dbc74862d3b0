"""The OpenVINO engine on a tiny random model with int8 weights, with the transformers engine as the oracle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from guardreasoner_vl.engines.int8 import quantised
from guardreasoner_vl.engines.openvino_engine import OpenVinoEngine
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.errors import MissingExtraError, ModelError
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.protocol import CANDIDATES, FAST_PREFIX
from tests.engines.conformance import FIELDS, SLOTS, EngineConformance, asked
from tests.engines.test_model_files import changed_json
from tests.engines.test_transformers_engine import mixed

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.engines.base import Engine, EngineRequest, EngineResult

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def oracle(int8_model: Path) -> TransformersEngine:
    return TransformersEngine.load(str(int8_model), dtype="fp32")


@pytest.fixture(scope="module")
def exact(int8_model: Path) -> OpenVinoEngine:
    return OpenVinoEngine.load(str(int8_model), dtype="fp32")


class TestOpenVino(EngineConformance):
    @pytest.fixture
    def engine(self, tiny_model: Path) -> Engine:
        return OpenVinoEngine.load(str(tiny_model))


class TestExactOpenVino(EngineConformance):
    @pytest.fixture
    def engine(self, exact: OpenVinoEngine) -> Engine:
        return exact


def test_stored_int8_weights_keep_their_values() -> None:
    """What a folder stores in int8 is quantised once more when the graph is built."""
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(5)) * torch.logspace(-6, 3, 300)[:, None]
    numbers, scale = quantised(weight)
    again, scale_again = quantised(numbers.float() * scale.float())
    assert torch.equal(numbers, again)
    assert torch.equal(scale, scale_again)


class TestAgainstTransformers:
    """With fp32 the only difference is the order of sums."""

    def test_answers_are_equal(self, exact: OpenVinoEngine, oracle: TransformersEngine) -> None:
        limits = [40, 7, 33, 1, 25]
        requests = [
            replace(request, max_new_tokens=limit, ban_empty_think=True, label_fields=FIELDS, candidates=CANDIDATES)
            for request, limit in zip(mixed(), limits, strict=True)
        ]
        expected = oracle.generate(requests)
        results = exact.generate(requests)
        assert [result.token_ids for result in results] == [result.token_ids for result in expected]
        assert [used(result) for result in results] == [used(result) for result in expected]
        assert len({result.token_ids[:5] for result in results}) == 5

    def test_scores_are_equal(self, exact: OpenVinoEngine, oracle: TransformersEngine) -> None:
        requests = [replace(request, forced_prefix=FAST_PREFIX) for request in mixed()]
        for result, expected in zip(
            exact.score(requests, SLOTS, CANDIDATES), oracle.score(requests, SLOTS, CANDIDATES), strict=True
        ):
            assert result.chosen == expected.chosen
            for logprobs, others in zip(result.logprobs, expected.logprobs, strict=True):
                assert logprobs == pytest.approx(others, abs=1e-3)

    def test_samples_of_one_prompt_are_equal(self, exact: OpenVinoEngine, oracle: TransformersEngine) -> None:
        drawn = [replace(asked(), temperature=1.0, seed=seed, max_new_tokens=20) for seed in range(6)]
        results = exact.generate(drawn)
        assert [result.token_ids for result in results] == [result.token_ids for result in oracle.generate(drawn)]
        assert len({result.token_ids for result in results}) > 1

    def test_the_instruction_is_read_once(self, exact: OpenVinoEngine) -> None:
        request = replace(asked("Where is the kite?"), forced_prefix=FAST_PREFIX)
        exact.forget()
        (first,) = exact.score([request], SLOTS, CANDIDATES)
        (again,) = exact.score([request], SLOTS, CANDIDATES)
        assert first.logprobs == again.logprobs
        assert again.usage.cached_tokens > 0
        assert exact.capabilities.prefix_cache

    def test_padding_changes_nothing(self, exact: OpenVinoEngine) -> None:
        short, long = asked("A kite?"), asked("Tell me about " + "tomato soup and " * 30)
        alone = exact.generate([short])[0]
        assert exact.generate([long, short])[1].token_ids == alone.token_ids


def test_default_precision_is_close(tiny_model: Path, oracle: TransformersEngine) -> None:
    """Hidden states in int8 move a probability by little, also with weights that are ten times wider than usual."""
    engine = OpenVinoEngine.load(str(tiny_model))
    requests = [replace(request, forced_prefix=FAST_PREFIX) for request in mixed()]
    assert largest_difference(engine, oracle, requests) < 0.1


def used(result: EngineResult) -> tuple[int, int, int]:
    return result.usage.prompt_tokens, result.usage.cached_tokens, result.usage.completion_tokens


def largest_difference(engine: Engine, other: Engine, requests: list[EngineRequest]) -> float:
    """The largest difference of a label's probability."""
    results = zip(engine.score(requests, SLOTS, CANDIDATES), other.score(requests, SLOTS, CANDIDATES), strict=True)
    differences = [
        (torch.tensor(result.logprobs).softmax(-1) - torch.tensor(expected.logprobs).softmax(-1)).abs().max()
        for result, expected in results
    ]
    return max(map(float, differences))


def test_a_guard_judges_with_it(int8_model: Path) -> None:
    with Guard.load(str(int8_model), "openvino") as guard:
        assert isinstance(guard.engine, OpenVinoEngine)
        verdict = guard.moderate("How do I bake bread?", mode="fast")
        assert verdict.error is None
        assert verdict.request.score is not None


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, int8_model: Path) -> None:
    monkeypatch.setattr("guardreasoner_vl.guard.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"^openvino is not installed: install .* extra 'openvino'"):
        Guard.load(str(int8_model), "openvino")


def test_a_model_that_the_graph_does_not_compute(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    text = json.loads((folder / "config.json").read_text("utf-8"))["text_config"]
    changed_json(folder / "config.json", text_config=text | {"use_sliding_window": True})
    with pytest.raises(ModelError, match=r"neither sliding windows .*: use --engine transformers$"):
        OpenVinoEngine.load(str(folder))


def test_a_model_that_does_not_compile(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("guardreasoner_vl.engines.openvino_graph.openvino.Core.compile_model", refuse)
    with pytest.raises(ModelError, match=r"cannot compile it \(no such instruction\); use --engine transformers"):
        OpenVinoEngine.load(str(tiny_model))


def test_nothing_reports_its_use(int8_model: Path) -> None:
    """OpenVINO's packages tell their makers over the network that they were imported, unless that is prevented."""
    program = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise SystemExit('a connection was opened')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "from guardreasoner_vl.engines.openvino_engine import OpenVinoEngine\n"
        f"OpenVinoEngine.load({str(int8_model)!r})\n"
        "assert 'openvino_telemetry' not in sys.modules, 'telemetry was imported'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
