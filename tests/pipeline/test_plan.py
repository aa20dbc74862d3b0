"""The plan: arithmetic by hand, and that nothing is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.corpus.store import CorpusInfo, write_corpus
from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.pipeline.plan import commands, model_size, plan_of
from guardreasoner_vl.pipeline.run import STAGES
from guardreasoner_vl.recipe import load_recipe, parse_recipe
from guardreasoner_vl.types import Sample
from tests.smoke import PATH

if TYPE_CHECKING:
    from guardreasoner_vl.recipe import Recipe


def recipe(name: str) -> Recipe:
    return load_recipe(PATH.parent / f"{name}.yaml")


def recipe_with(name: str, **sections: dict[str, Any]) -> Recipe:
    """A shipped recipe with other values of some keys."""
    content = recipe(name).model_dump(mode="json")
    return parse_recipe({**content, **{section: content[section] | keys for section, keys in sections.items()}})


@pytest.mark.parametrize(("name", "billions"), [("3b", 3.75), ("7b", 8.29)])
def test_the_papers_models_are_counted_without_their_weights(name: str, billions: float) -> None:
    size = model_size(recipe(name))
    assert size is not None
    assert size.parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_papers_batches(tmp_path: Path) -> None:
    text = plan_of(recipe("3b"), Path("recipes/3b.yaml"), Path(), tmp_path / "out", STAGES, 4)
    assert "6 rows x 8 accumulated x 4 devices = 192 rows a step" in text
    assert "512 prompts x 16 = 8,192 completions a rollout batch; 256 x 16 = 4,096 an update, 2 updates" in text
    assert "at most 25,165,824 tokens generated" in text
    # ZeRO-2 of 3.75 B parameters: 2 bytes of weights, 2 of gradients and 12 of AdamW over 4 GPUs
    assert "(weights 7.5 GB, gradients 1.9 GB, AdamW 11.3 GB, DeepSpeed's buckets 4.0 GB, activations 5.8 GB" in text
    # RL: 4 bytes of weights, 8 of AdamW over 4 GPUs, 2 cast by autocast, 4 of gradients; 2^28 logits of 14 bytes
    assert "(weights 15.0 GB, AdamW 7.5 GB, autocast copies 7.5 GB, gradients 15.0 GB, activations 9.6 GB, " in text
    assert "logits 3.8 GB)" in text
    # 32,768 prompt tokens and 128 answers of 3,072: 36 layers, 256 wide, keys in fp32 and values in bf16
    assert "autocast copies 7.5 GB, keys and values 23.6 GB)" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gpus", [4, 8])
@pytest.mark.parametrize("name", ["3b", "3b-eco", "7b", "7b-eco"])
def test_the_papers_recipes_on_gpus_of_80_gb(name: str, gpus: int, tmp_path: Path) -> None:
    text = plan_of(recipe(name), Path("r.yaml"), Path(), tmp_path, ["sft", "grpo"], gpus, 80)
    sft, grpo = (line for line in text.splitlines() if "fit" in line)
    assert sft == "sft: fits 80.0 GB"
    if name.startswith("3b"):
        assert grpo == "grpo: fits 80.0 GB"
    else:  # 4 bytes of weights, 4 of gradients and 2 cast by autocast are 82.9 GB
        assert grpo == "grpo: does not fit 80.0 GB: set grpo.precision: bf16-weights"
        assert "grpo: fits 141.0 GB" in plan_of(recipe(name), Path("r.yaml"), Path(), tmp_path, ["grpo"], gpus, 141)
        changed = recipe_with(name, grpo={"precision": "bf16-weights"})
        assert "grpo: fits 80.0 GB" in plan_of(changed, Path("r.yaml"), Path(), tmp_path, ["grpo"], gpus, 80)


@pytest.mark.parametrize(
    ("section", "gpus", "gpu_memory", "change"),
    [
        ({}, 4, 80, "sft.deepspeed.zero_optimization.stage: 1"),
        ({"gradient_checkpointing": False}, 1, 80, "sft.gradient_checkpointing: true"),
        ({"gradient_checkpointing": False}, 1, 72, "sft.gradient_checkpointing: true and sft.precision: bf16-weights"),
    ],
)
def test_the_plan_names_what_makes_sft_fit(
    section: dict[str, Any], gpus: int, gpu_memory: int, change: str, tmp_path: Path
) -> None:
    """3B in fp32 takes 4 + 4 + 8 + 2 bytes a parameter, 67.6 GB, and 15.0 GB of DDP's buckets on several GPUs."""
    changed = recipe_with("3b", sft={"deepspeed": None, **section})
    text = plan_of(changed, Path("r.yaml"), Path(), tmp_path, ["sft"], gpus, gpu_memory)
    assert f"sft: does not fit {gpu_memory}.0 GB: set {change}\n" in text


def test_a_gpu_that_no_change_helps(tmp_path: Path) -> None:
    text = plan_of(recipe("7b"), Path("r.yaml"), Path(), tmp_path, ["grpo"], 2, 16)
    assert "grpo: does not fit 16.0 GB: plan for more GPUs or for more memory" in text


def test_a_total_batch_that_the_gpus_cannot_share(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"sft\.total_batch 192 is not a multiple of 6 rows .* on 5 devices"):
        plan_of(recipe("3b"), Path("r.yaml"), Path(), tmp_path, ["sft"], 5)
    text = plan_of(recipe("3b"), Path("r.yaml"), Path(), tmp_path, ["sft"], 8)
    assert "6 rows x 4 accumulated x 8 devices = 192 rows a step" in text


def test_steps_follow_from_what_is_there(tmp_path: Path) -> None:
    rows = [Sample(id=str(n), source="s", modality="text", prompt="a", request_label="harmful") for n in range(100)]
    write_corpus(tmp_path / "augment", CorpusInfo(name="x"), rows)
    parsed = parse_recipe(
        {"name": "r", "model": {"path": "nowhere"}, "grpo": {"rollout_batch": 16, "update_batch": 4, "epochs": 2}}
    )
    text = plan_of(parsed, Path("r.yaml"), Path(), tmp_path, ["grpo"])
    assert "12 rollout batches, 48 updates; B_1 = 0.1833, B_6 = 0.0223, B_12 = 0.0000" in text
    assert "size unknown" in text


def test_commands_for_several_gpus() -> None:
    paths = Path("r.yaml"), Path("my data"), Path("o")
    run = "guardreasoner-vl run r.yaml --data 'my data' --out o"
    assert commands(*paths, STAGES, 1) == [run]
    launched = f"accelerate launch --num_processes 8 --no_python {run} --stages"
    assert commands(*paths, STAGES, 8) == [
        f"{run} --stages curate,synthesize",
        f"{launched} sft",
        f"{run} --stages mine,augment",
        f"{launched} grpo",
        f"{run} --stages evaluate",
    ]


def test_commands_name_the_stages_asked_for_in_the_methods_order() -> None:
    paths = Path("r.yaml"), Path(), Path("o")
    assert commands(*paths, ["grpo", "sft"], 1) == ["guardreasoner-vl run r.yaml --out o --stages sft,grpo"]
    assert len(commands(*paths, ["grpo", "sft"], 2)) == 2


def test_a_recipe_that_trains_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no model to train"):
        plan_of(recipe("vltrain"), Path("r.yaml"), Path(), tmp_path, STAGES)
