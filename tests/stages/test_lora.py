"""Adapters in SFT and in RL: exact resume, small checkpoints, the merged folder, and what they leave as it is."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from guardreasoner_vl.corpus.store import read_corpus
from guardreasoner_vl.engines.adapter import CONFIG, WEIGHTS, merge_folder
from guardreasoner_vl.engines.model_files import PROCESSOR
from guardreasoner_vl.engines.weights import read_network
from guardreasoner_vl.errors import DataError, RecipeError
from guardreasoner_vl.recipe import LoraSection
from guardreasoner_vl.stages import grpo, sft
from guardreasoner_vl.training import sft_trainer
from guardreasoner_vl.training.grpo.log import Validation
from tests.stages.test_sft import Stop
from tests.training import toy
from tests.training.grpo import toy_grpo
from tests.training.grpo.toy_grpo import STEPS, adapted, assert_equal, assert_same_end, weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from guardreasoner_vl.stages.grpo import TrainingStep

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
PRECISIONS = ("bf16", "bf16-weights")
MATRICES = 2 * 2 * 7  # A and B of seven layers in each of two blocks


def optimizer_tensors(checkpoint: Path) -> list[torch.Tensor]:
    """The first moments of all trained tensors."""
    content = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return [state["exp_avg"] for state in content["state"].values()]


def network(folder: Path, adapter: Path | None = None) -> dict[str, torch.Tensor]:
    """A model folder's weights in bf16, with an adapter merged."""
    model = read_network(folder, torch.bfloat16)
    if adapter:
        merge_folder(model, adapter)
    return dict(model.state_dict())


def changed(folder: Path, start: Path) -> set[str]:
    """The last part but one of the names of the weights that differ."""
    before = network(start)
    return {name.split(".")[-2] for name, value in network(folder).items() if not torch.equal(value, before[name])}


# --- SFT ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_data(tmp_path_factory.mktemp("data"), toy.rows(12))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """Finished runs of six steps by precision."""
    runs = {}
    for precision in PRECISIONS:
        runs[precision] = tmp_path_factory.mktemp(precision)
        sft.run(adapted(toy.recipe(precision=precision)), data, runs[precision])
    return runs


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sft_resumes_as_if_it_had_not_stopped(
    precision: str, data: Path, tuned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = sft_trainer.build_trainer

    def stopping(*arguments: Any) -> Any:
        trainer = build(*arguments)
        trainer.add_callback(Stop(3))
        return trainer

    recipe = adapted(toy.recipe(precision=precision))
    with monkeypatch.context() as patch:
        patch.setattr(sft_trainer, "build_trainer", stopping)
        with pytest.raises(KeyboardInterrupt):
            sft.run(recipe, data, tmp_path)
    torch.manual_seed(12345)  # what the process drew before does not matter
    sft.run(recipe, data, tmp_path)
    for path in (f"checkpoint-6/{WEIGHTS}", f"adapter/{WEIGHTS}", "model/model.safetensors"):
        assert_equal(*(load_file(out / "sft" / path) for out in (tmp_path, tuned[precision])))
    first, second = (optimizer_tensors(out / "sft" / "checkpoint-6") for out in (tmp_path, tuned[precision]))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpoints_of_sft_hold_adapters_alone(precision: str, tuned: dict[str, Path]) -> None:
    checkpoint = tuned[precision] / "sft" / "checkpoint-6"
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {WEIGHTS}
    stored = load_file(checkpoint / WEIGHTS)
    assert len(stored) == len(optimizer_tensors(checkpoint)) == MATRICES
    assert {value.dtype for value in stored.values()} == {torch.float32 if precision == "bf16" else torch.bfloat16}
    assert all(value.any() for value in stored.values())  # B was zero at the start


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sft_s_folder_is_its_start_with_the_adapter_merged(precision: str, tuned: dict[str, Path]) -> None:
    base, adapter, model = (tuned[precision] / name for name in ("base", "sft/adapter", "sft/model"))
    assert {path.name for path in adapter.iterdir()} == {CONFIG, WEIGHTS, PROCESSOR}
    assert_equal(network(model), network(base, adapter))
    assert changed(model, base) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (model / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_broken_adapters_of_a_checkpoint_are_named(data: Path, tuned: dict[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(tuned["bf16"], tmp_path / "run")
    shutil.rmtree(out / "sft" / "model")
    broken = out / "sft" / "checkpoint-6" / WEIGHTS
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"checkpoint-6 cannot be read: remove it"):
        sft.run(adapted(toy.recipe(precision="bf16")), data, out)


def test_other_adapters_are_another_recipe(data: Path, tuned: dict[str, Path]) -> None:
    for recipe, key in (
        (adapted(toy.recipe(precision="bf16"), 4), r"lora\.rank"),
        (toy.recipe(precision="bf16"), "lora"),
    ):
        with pytest.raises(RecipeError, match=rf"changed: {key}\)"):
            sft.run(recipe, data, tuned["bf16"])


# --- RL -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_grpo.write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module", autouse=True)
def made_up() -> Iterator[None]:
    with toy_grpo.made_up():
        yield


@pytest.fixture(scope="module")
def reinforced(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Path, made_up: None
) -> dict[str, Path]:
    """Finished runs of four rollout batches by precision."""
    runs = {}
    for precision in PRECISIONS:
        runs[precision] = tmp_path_factory.mktemp(precision)
        grpo.run(adapted(toy_grpo.recipe(precision=precision, evaluate_every=None)), tiny_model, rows, runs[precision])
    return runs


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rl_resumes_as_if_it_had_not_stopped(
    precision: str, tiny_model: Path, rows: Path, reinforced: dict[str, Path], tmp_path: Path
) -> None:
    recipe = adapted(toy_grpo.recipe(precision=precision, evaluate_every=None))

    def interrupted(step: int) -> Callable[[TrainingStep], None]:
        def progress(now: TrainingStep) -> None:
            if now.step == step:
                raise KeyboardInterrupt

        return progress

    for step in (1, 3):  # without a checkpoint, and with the one after batch 2
        with pytest.raises(KeyboardInterrupt):
            grpo.run(recipe, tiny_model, rows, tmp_path, progress=interrupted(step))
    torch.manual_seed(12345)
    grpo.run(recipe, tiny_model, rows, tmp_path)
    assert_same_end(tmp_path, reinforced[precision])
    assert_equal(*(load_file(out / "grpo" / "adapter" / WEIGHTS) for out in (tmp_path, reinforced[precision])))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rl_changes_adapters_alone(precision: str, reinforced: dict[str, Path], tiny_model: Path) -> None:
    out = reinforced[precision]
    checkpoint = out / "grpo" / f"checkpoint-{STEPS}"
    stored = weights(out)
    assert len(stored) == len(optimizer_tensors(checkpoint)) == MATRICES
    assert all(".lora_" in name and value.any() for name, value in stored.items())
    before = weights(out, 2)
    assert all(not torch.equal(value, before[name]) for name, value in stored.items())
    model, adapter = out / "grpo" / "model", out / "grpo" / "adapter"
    assert_equal(network(model), network(tiny_model, adapter))
    assert changed(model, tiny_model) <= set(LoraSection().targets)


def test_the_start_wins_with_adapters_that_add_nothing(
    tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [0.5, 0.25]
    monkeypatch.setattr(grpo, "validate", lambda *_: Validation(f1=scores.pop(0), coverage=1.0, tokens=2.0))
    recipe = adapted(toy_grpo.recipe(steps=1, evaluate_every=1))
    model = grpo.run(recipe, tiny_model, rows, tmp_path, list(read_corpus(rows)))
    assert changed(model, tiny_model) == set()
    stored = load_file(tmp_path / "grpo" / "adapter" / WEIGHTS)
    assert not any(value.any() for name, value in stored.items() if ".lora_B." in name)
