"""A GRPO run that takes a second: the tiny model, mild rows, and a made-up reward that random answers differ in."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from guardreasoner_vl.corpus.store import CorpusInfo, write_corpus
from guardreasoner_vl.recipe import LoraSection, Recipe, parse_recipe
from guardreasoner_vl.rl.reward import Reward
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.stages import grpo
from guardreasoner_vl.training.grpo import rollouts as grpo_rollouts
from guardreasoner_vl.training.grpo.log import Validation
from guardreasoner_vl.training.model_folder import load_for_training
from tests.training import toy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from guardreasoner_vl.training.grpo.rollouts import Rollout

ROWS = 10  # an epoch has 2 rollout batches, and 2 rows of it are left out
STEPS = 4
GRPO: dict[str, Any] = {
    "group_size": 4,
    "rollout_batch": 4,
    "update_batch": 2,
    "max_prompt_length": 120,
    "max_completion_length": 16,
    "steps": STEPS,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "clip": {"schedule": "linear"},
    "evaluate_every": 2,
    "evaluate_rows": 6,
    "save_every": 2,
}
_judge = grpo_rollouts.judge_completion


def recipe(**section: Any) -> Recipe:
    return parse_recipe({"name": "toy", "seed": 1, "grpo": {**GRPO, **section}})


def adapted(recipe: Recipe, rank: int = 2) -> Recipe:
    """The recipe with LoRA adapters, with dropout in SFT."""
    return recipe.model_copy(update={"lora": LoraSection(rank=rank, alpha=4, dropout=0.1)})


def write_rows(root: Path, count: int = ROWS) -> Path:
    """A corpus of rows of all kinds."""
    written = toy.write_data(root / "files", toy.rows(count))
    write_corpus(root / "corpus", CorpusInfo(name="toy"), read_samples(written / "toy" / "train.jsonl"))
    return root / "corpus"


def odd_tokens(ids: tuple[int, ...]) -> float:
    """-1 to 0: the more odd tokens, the better."""
    return sum(token % 2 for token in ids) / len(ids) - 1


def rewarding(total: Callable[[tuple[int, ...]], float] = odd_tokens) -> Callable[..., Rollout]:
    """What judges completions instead of the labels, which a random model never writes."""

    def judge(*arguments: Any) -> Rollout:
        rollout = _judge(*arguments)
        return replace(rollout, reward=Reward(1.0, 0.5, 0.5, 0.25, total(rollout.ids)))

    return judge


def f1_of_weights(samples: Any, engine: Any, limit: int, ranks: Any) -> Validation:
    """A made-up F1 that the weights alone decide."""
    total = sum(float(one.detach().double().abs().sum()) for one in engine.network.parameters())
    return Validation(f1=total % 1, coverage=None, tokens=1.0)


def install(patch: pytest.MonkeyPatch) -> None:
    """The made-up reward and the made-up F1."""
    patch.setattr(grpo_rollouts, "judge_completion", rewarding())
    patch.setattr(grpo, "validate", f1_of_weights)


@contextmanager
def made_up() -> Iterator[pytest.MonkeyPatch]:
    """`install`, and no figure, which takes longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        patch.setattr(grpo, "draw_training", lambda *_: None)
        yield patch


def log(out: Path) -> list[dict[str, Any]]:
    """The rows without what a clock says."""
    lines = (out / "grpo" / "log.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if "seconds" not in name} for line in lines]


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (out / "grpo").glob("checkpoint-*"))


def weights(out: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(out / "grpo" / f"checkpoint-{step}" / "weights.safetensors")
    return tensors


def halves(of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rounded to bf16."""
    return {name: value.to(torch.bfloat16).float() for name, value in of.items()}


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """A model folder's weights by the names that a checkpoint has them under, in fp32."""
    return dict(load_for_training(folder, "fp32").named_parameters())


def shipped(out: Path) -> dict[str, torch.Tensor]:
    return parameters(out / "grpo" / "model")


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_same_end(out: Path, other: Path) -> None:
    """Weights, optimizer, log and finished model agree to the bit."""
    assert log(out) == log(other)
    assert_equal(weights(out), weights(other))
    assert_equal(*(load_file(run / "grpo" / "model" / "model.safetensors") for run in (out, other)))
    first, second = (
        torch.load(folder / "grpo" / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
        for folder in (out, other)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.get("masters", []), second.get("masters", []), strict=True))
    for key, state in first["state"].items():
        assert all(torch.equal(value, second["state"][key][name]) for name, value in state.items())
