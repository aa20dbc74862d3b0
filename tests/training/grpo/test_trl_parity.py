"""Parity with stock TRL: log-probabilities, loss and gradients, for every modality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from guardreasoner_vl.corpus.store import CorpusInfo, write_corpus
from guardreasoner_vl.engines.qwen import QwenInputs
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.mining.rollout_io import rollout_request
from guardreasoner_vl.recipe import GrpoSection, parse_recipe
from guardreasoner_vl.rl import shared_prefix
from guardreasoner_vl.rl.reward import Reward
from guardreasoner_vl.rl.shared_prefix import use_shared_prefix
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.training.grpo import trl_parity as stock_grpo
from guardreasoner_vl.training.grpo.rollouts import Rollout, RolloutGroup
from guardreasoner_vl.training.grpo.trl_parity import StockGrpo, compared, verify
from guardreasoner_vl.training.grpo.update import Passes
from guardreasoner_vl.training.model_folder import load_for_training
from tests.training import toy

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.types import Sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
SECTION = GrpoSection(group_size=4, precision="fp32", temperature=1.2)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    root = toy.write_data(tmp_path_factory.mktemp("rows"), toy.rows(16))
    return list(read_samples(root / "toy" / "train.jsonl"))


def group(sample: Sample, inputs: QwenInputs, seed: int) -> RolloutGroup:
    """Made-up completions of unequal lengths."""
    rng = np.random.default_rng(seed)
    request = rollout_request(sample)
    none = Reward(0, 0, 0, 0, 0)
    answers = [tuple(int(token) for token in rng.integers(20, 250, size)) for size in (7, 1, 12, 5)]
    return RolloutGroup(
        sample,
        inputs.encode(request.messages, request.images),
        request.images,
        tuple(Rollout(ids, none) for ids in answers),
        (1.2, -0.7, 0.4, -0.9),
    )


@pytest.mark.parametrize("kinds", [("text",), ("image",), ("text-image",), ("text", "image", "text-image")])
@pytest.mark.parametrize("budget", [16_384, 80])
def test_parity(tiny_model: Path, tmp_path: Path, samples: list[Sample], kinds: tuple[str, ...], budget: int) -> None:
    inputs = QwenInputs.from_folder(tiny_model)
    model = load_for_training(tiny_model, "fp32")
    use_shared_prefix(model)
    chosen = [next(row for row in samples if row.modality == kind) for kind in kinds]
    groups = [group(sample, inputs, number) for number, sample in enumerate(chosen)]
    section = SECTION.model_copy(update={"pass_tokens": budget})
    stock = StockGrpo(model, tiny_model, inputs, section, tmp_path)
    report = compared(model.train(), stock, Passes(inputs, section, torch.device("cpu")), groups, section)
    assert report.log_probability < 1e-5
    assert report.loss < 1e-6
    assert report.gradient < 1e-5


def test_on_demand(tiny_model: Path, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus", CorpusInfo(name="toy"), samples)
    recipe = parse_recipe({"name": "r", "grpo": {"precision": "fp32", "max_completion_length": 24}})
    report = verify(recipe, tiny_model, tmp_path / "corpus")
    assert report.rows == 6
    assert report.gradient < 1e-5
    assert "compared with stock TRL on 6 rows" in report.summary()

    def wrong(*arguments: Any, **named: Any) -> torch.Tensor:
        return 1.01 * shared_prefix.log_probabilities(*arguments, **named)

    monkeypatch.setattr("guardreasoner_vl.training.grpo.update.log_probabilities", wrong)
    with pytest.raises(DataError, match="differs from stock TRL's"):
        stock_grpo.verify(recipe, tiny_model, tmp_path / "corpus")
