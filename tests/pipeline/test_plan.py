"""The plan: arithmetic by hand, and that nothing is done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.corpus.store import CorpusInfo, write_corpus
from guardreasoner_vl.errors import ModelError, RecipeError
from guardreasoner_vl.pipeline.plan import commands, model_size, plan_of
from guardreasoner_vl.pipeline.run import STAGES
from guardreasoner_vl.recipe import load_recipe, parse_recipe
from guardreasoner_vl.types import Sample
from tests.smoke import PATH

if TYPE_CHECKING:
    from guardreasoner_vl.recipe import Recipe


pytestmark = pytest.mark.slow


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
    assert "(weights 7.5 GB, gradients 1.9 GB, AdamW 11.3 GB, DeepSpeed's buckets 4.0 GB, activations 3.3 GB" in text
    # RL: 4 bytes of weights, 8 of AdamW over 4 GPUs, 2 cast by autocast, 4 of gradients; 2^28 logits of 14 bytes
    assert "(weights 15.0 GB, AdamW 7.5 GB, autocast copies 7.5 GB, gradients 15.0 GB, activations 6.8 GB, " in text
    assert "one layer, the logits or the step 3.8 GB)" in text
    # 128 prompts of 256 tokens and answers of 3,072: buffers, grown by a half each time, of 4,399 tokens in 36 layers,
    # 256 wide, keys in fp32 and values in bf16; those of one layer 2,048 wide, the keys in bf16 too
    assert "autocast copies 7.5 GB, keys and values 31.1 GB, repeated for the heads 7.0 GB)" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gpus", [4, 8])
@pytest.mark.parametrize("name", ["3b", "3b-eco", "7b", "7b-eco"])
def test_the_papers_recipes_on_gpus_of_80_gb(name: str, gpus: int, tmp_path: Path) -> None:
    text = plan_of(recipe(name), Path("r.yaml"), Path(), tmp_path, ["sft", "grpo"], gpus, 80)
    lines = [line for line in text.splitlines() if "fit" in line]
    assert lines == ["sft: fits 80.0 GB", "grpo: fits 80.0 GB"]


@pytest.mark.parametrize("gpus", [4, 8])
def test_rl_of_7b_with_whole_weights_on_every_gpu(gpus: int, tmp_path: Path) -> None:
    """4 bytes of weights, 4 of gradients and 2 cast by autocast are 82.9 GB."""
    whole = recipe_with("7b", grpo={"shard_weights": False})
    text = plan_of(whole, Path("r.yaml"), Path(), tmp_path, ["grpo"], gpus, 80)
    assert "grpo: does not fit 80.0 GB: set grpo.shard_weights: true" in text
    assert "grpo: fits 141.0 GB" in plan_of(whole, Path("r.yaml"), Path(), tmp_path, ["grpo"], gpus, 141)
    halves = recipe_with("7b", grpo={"shard_weights": False, "precision": "bf16-weights"})
    assert "grpo: fits 80.0 GB" in plan_of(halves, Path("r.yaml"), Path(), tmp_path, ["grpo"], gpus, 80)


@pytest.mark.parametrize(("name", "rows"), [("3b", 64), ("3b-eco", 64), ("7b", 16), ("7b-eco", 16)])
def test_the_papers_recipes_on_a_gpu_of_24_gb(name: str, rows: int, tmp_path: Path) -> None:
    text = plan_of(recipe(name), Path("r.yaml"), Path(), tmp_path, ["sft", "mine", "grpo"], 1, 24)
    sft, mining, grpo = (line for line in text.splitlines() if " fit" in line)
    none = "does not fit 24.0 GB: plan for more GPUs or for more memory, no key of the recipe is enough"
    assert (sft, grpo) == (f"sft: {none}", f"grpo: {none}")
    tokens = 256 * rows  # as many for each prompt as before
    assert mining == f"mine: does not fit 24.0 GB: set mine.max_rows: {rows} and mine.max_tokens: {tokens}"
    smaller = recipe_with(name, mine={"max_rows": rows, "max_tokens": tokens})
    assert "mine: fits 24.0 GB" in plan_of(smaller, Path("r.yaml"), Path(), tmp_path, ["mine"], 1, 24)


def test_the_table_of_the_documents_has_the_memory_of_the_plan(tmp_path: Path) -> None:
    lines = (PATH.parents[1] / "docs" / "reproduce.md").read_text("utf-8").splitlines()
    for column, name in ((2, "3b"), (3, "7b")):
        text = plan_of(recipe(name), Path("r.yaml"), Path(), tmp_path, ["sft", "mine", "grpo"], 4)
        rows = [line.split("|") for line in lines if ", GB on " in line]
        assert [row[1].split(",")[0].strip() for row in rows] == ["SFT", "mining", "RL"]
        numbers = [number for row in rows for number in re.findall(r"\d+\.\d", row[column].split(";")[0])]
        assert [f"about {number} GB a GPU" in text for number in numbers] == [True] * 4


ROWS_OF_MEMORY = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in (PATH.parents[1] / "docs" / "training.md").read_text("utf-8").splitlines()
    if re.match(r"\| `[37]b[^|]*\|[^|]*\| \d", line)
]
"""The documents' tables of memory: recipes and changes, GPUs or trained weights, GB of SFT, update and rollouts."""

CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "without `sft.deepspeed`": {"sft": {"deepspeed": None}},
    "with `shard_weights` in both": {
        "sft": {"deepspeed": None, "shard_weights": True},
        "grpo": {"shard_weights": True},
    },
    "without `grpo.shard_weights`": {"grpo": {"shard_weights": False}},
    "with `grpo.precision: bf16-weights`": {"grpo": {"precision": "bf16-weights", "shard_weights": False}},
}


@pytest.mark.parametrize("row", ROWS_OF_MEMORY, ids=lambda row: " ".join(row[:2]))
def test_a_row_of_the_documents_tables_of_memory(row: list[str], tmp_path: Path) -> None:
    names, gpus, *numbers, fits = row
    change = next((keys for words, keys in CHANGES.items() if words in names), {})
    count, limit = (1, 24) if "lora" in names else (int(gpus), 80)
    for name in re.findall(r"`([37]b[^`]*)`", names):
        plan = plan_of(recipe_with(name, **change), Path("r.yaml"), Path(), tmp_path, ["sft", "grpo"], count, limit)
        planned = re.findall(r"(?:training|an update|greatest length): about (\S+) GB a GPU", plan)
        assert [number.partition(" ")[0] for number in numbers] == planned
        refused = [stage for stage in ("sft", "grpo") if f"{stage}: does not fit" in plan]
        assert fits == {(): "yes", ("sft",): "SFT does not", ("grpo",): "RL does not"}[tuple(refused)]
        if "lora" in names:
            assert f"adapters of {gpus} parameters" in plan


def test_every_table_of_memory_is_checked() -> None:
    assert len(ROWS_OF_MEMORY) == 14


def test_the_memory_of_mining(tmp_path: Path) -> None:
    """Weights in bf16; buffers of 4,399 tokens, as for RL's prompts of 256 tokens, with keys and values in bf16.

    128 x 4,352 tokens are repeated, 2,048 wide.
    """
    text = plan_of(recipe("3b"), Path("r.yaml"), Path(), tmp_path, ["mine"])
    needed = "about 32.8 GB a GPU (weights 7.5 GB, keys and values 20.8 GB, repeated for the heads 4.6 GB)"
    assert f"128 answers of the greatest length: {needed}" in text
    served = recipe_with("3b", mine={"base_url": "http://localhost:8000/v1"})
    assert "a GPU" not in plan_of(served, Path("r.yaml"), Path(), tmp_path, ["mine"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "llama"}', "a model of type 'llama'"),
        ("{", "cannot be read as JSON"),
        (None, "no config.json"),
    ],
)
def test_a_start_model_of_another_kind(config: str | None, message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    other = recipe("3b").model_dump(mode="json") | {"model": {"path": str(tmp_path)}}
    with pytest.raises(ModelError, match=message):
        plan_of(parse_recipe(other), Path("r.yaml"), Path(), tmp_path / "out", STAGES, 4)


def test_sharded_weights(tmp_path: Path) -> None:
    changed = recipe_with("7b", sft={"deepspeed": None, "shard_weights": True}, grpo={"shard_weights": True})
    size = model_size(changed)
    assert size is not None
    # 7B's layer: 3584 x (3584 x 2 + 512 x 2) and biases, MLP of 3 x 3584 x 18944, two norms
    assert size.layer == 3584 * (2 * 3584 + 2 * 512) + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584
    # the language head, the final norm, and the tower's patch embedding and merger
    assert size.outside == 152_064 * 3584 + 3584 + 1176 * 1280 + 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584
    text = plan_of(changed, Path("r.yaml"), Path(), tmp_path, ["sft", "grpo"], 4, 80)
    # 4 bytes of weights, 4 of gradients and 8 of AdamW over 4 GPUs; 2 x (2 x 0.233 + 0.591) GB are gathered in bf16
    assert "(weights 8.3 GB, gradients 8.3 GB, AdamW 16.6 GB, gathered weights 2.1 GB, activations" in text
    assert "(weights 8.3 GB, AdamW 16.6 GB, gradients 8.3 GB, gathered weights 2.1 GB, activations" in text
    assert "whole copy 16.6 GB" in text  # in bf16, for rollouts
    alone = plan_of(changed, Path("r.yaml"), Path(), tmp_path, ["sft", "grpo"], 1, 80)
    assert "gathered" not in alone
    assert "whole copy" not in alone


@pytest.mark.parametrize(
    ("section", "gpus", "gpu_memory", "change"),
    [
        ({}, 4, 80, "sft.shard_weights: true"),
        ({"gradient_checkpointing": False}, 1, 80, "sft.gradient_checkpointing: true"),
        ({"gradient_checkpointing": False}, 1, 76, "sft.gradient_checkpointing: true and sft.precision: bf16-weights"),
    ],
)
def test_the_plan_names_what_makes_sft_fit(
    section: dict[str, Any], gpus: int, gpu_memory: int, change: str, tmp_path: Path
) -> None:
    """3B in fp32 takes 4 + 4 + 8 + 2 bytes a parameter, 67.6 GB, and 15.0 GB of DDP's buckets on several GPUs; with
    bf16 weights it is 2 + 2 + 12, 60.1 GB, and 15.0 GB in the step."""
    changed = recipe_with("3b", sft={"deepspeed": None, **section})
    text = plan_of(changed, Path("r.yaml"), Path(), tmp_path, ["sft"], gpus, gpu_memory)
    assert f"sft: does not fit {gpu_memory}.0 GB: set {change}\n" in text


@pytest.mark.parametrize(
    ("section", "keys", "gpus", "gpu_memory", "change"),
    [
        ("sft", {"precision": "bf16-weights"}, 8, 40, "sft.shard_weights: true and sft.precision: bf16"),
        ("grpo", {"precision": "bf16-weights"}, 8, 24, "grpo.shard_weights: true and grpo.precision: bf16"),
        ("sft", {"shard_weights": True}, 1, 76, "sft.precision: bf16-weights and sft.shard_weights: false"),
        (
            "grpo",
            {"shard_weights": True, "max_completion_length": 3072},
            1,
            80,
            "grpo.precision: bf16-weights and grpo.shard_weights: false",
        ),
    ],
)
def test_the_plan_names_no_change_that_a_recipe_refuses(
    section: str, keys: dict[str, Any], gpus: int, gpu_memory: int, change: str, tmp_path: Path
) -> None:
    """Weights in shards are fp32."""
    common = {"deepspeed": None} if section == "sft" else {"pass_tokens": 4096, "max_completion_length": 1024}
    changed = recipe_with("3b", **{section: common | keys})
    text = plan_of(changed, Path("r.yaml"), Path(), tmp_path, [section], gpus, gpu_memory)
    assert f"{section}: does not fit {gpu_memory}.0 GB: set {change}\n" in text


def test_deepspeed_on_one_gpu(tmp_path: Path) -> None:
    """Its step copies all gradients, in bf16 and in fp32: 22.5 GB, less 3.3 GB of activations that are gone."""
    text = plan_of(recipe("3b"), Path("r.yaml"), Path(), tmp_path, ["sft"], 1, 80)
    assert "activations 3.3 GB, one layer, the logits or the step 19.2 GB)" in text
    assert "sft: does not fit 80.0 GB: set sft.deepspeed: null and sft.precision: bf16-weights\n" in text
    assert "sft: on one GPU set sft.deepspeed: null, or start this stage with `torchrun --nproc-per-node 1" in text
    assert "torchrun" not in plan_of(recipe("3b"), Path("r.yaml"), Path(), tmp_path, ["sft"], 4, 80)
    # At stage 3 at most the share's 10^9 weights at once, of 6 bytes.
    shares = recipe_with("3b", sft={"deepspeed": {"zero_optimization": {"stage": 3}}})
    assert "the step 3.2 GB)" in plan_of(shares, Path("r.yaml"), Path(), tmp_path, ["sft"], 1, 80)


@pytest.mark.parametrize("settings", [{"stage": "auto"}, {"stage": None}, 3, None])
def test_a_stage_of_zero_that_is_none(settings: Any, tmp_path: Path) -> None:
    changed = recipe_with("3b", sft={"deepspeed": {"zero_optimization": settings}})
    with pytest.raises(RecipeError, match=r"^sft\.deepspeed\.zero_optimization\.stage .*: write 0, 1, 2 or 3$"):
        plan_of(changed, Path("r.yaml"), Path(), tmp_path, ["sft"], 4)


def test_vllm_beside_the_training(tmp_path: Path) -> None:
    """A quarter of 80 GB stays vLLM's; rollouts hold no keys and values of the engine of this package."""
    rollouts: dict[str, Any] = {"engine": "vllm-colocate", "gpu_memory_utilization": 0.25}
    text = plan_of(recipe_with("3b", grpo={"rollouts": rollouts}), Path("r.yaml"), Path(), tmp_path, ["grpo"], 8, 80)
    assert "step 3.8 GB, vLLM 20.0 GB)" in text
    # 15.0 GB of weights, 8 bytes a parameter of AdamW over 8 GPUs, 7.5 GB cast by autocast
    line = "rollouts by vLLM: about 46.3 GB a GPU (weights 15.0 GB, AdamW 3.8 GB, autocast copies 7.5 GB, vLLM 20.0 GB)"
    assert line in text
    # 2 bytes x (3.75 B parameters + 6,144 tokens x 36 layers x 256 wide x 2)
    assert "vLLM needs 7.7 GB at least" in text
    assert "grpo: fits 80.0 GB" in text


@pytest.mark.parametrize(
    ("share", "change"),
    [(0.05, "grpo.rollouts.gpu_memory_utilization: 0.1"), (0.5, "grpo.shard_weights: true")],
)
def test_vllm_s_share_holds_its_weights_and_leaves_room(share: float, change: str, tmp_path: Path) -> None:
    rollouts = {"engine": "vllm-colocate", "gpu_memory_utilization": share}
    text = plan_of(recipe_with("3b", grpo={"rollouts": rollouts}), Path("r.yaml"), Path(), tmp_path, ["grpo"], 8, 80)
    assert f"grpo: does not fit 80.0 GB: set {change}" in text


def test_a_vllm_server_takes_nothing_of_the_training_s_gpus(tmp_path: Path) -> None:
    rollouts = {"engine": "vllm-server", "base_url": "http://localhost:8000/v1"}
    text = plan_of(recipe_with("3b", grpo={"rollouts": rollouts}), Path("r.yaml"), Path(), tmp_path, ["grpo"], 4, 80)
    assert "rollouts by vLLM: about 30.0 GB a GPU (weights 15.0 GB, AdamW 7.5 GB, autocast copies 7.5 GB)" in text


@pytest.mark.parametrize(("gpus", "gpu_memory"), [(1, 24), (4, 80), (8, 80)])
@pytest.mark.parametrize("name", ["3b-lora", "7b-lora"])
def test_adapters_fit_a_gpu_of_24_gb(name: str, gpus: int, gpu_memory: int, tmp_path: Path) -> None:
    text = plan_of(recipe(name), Path("r.yaml"), Path(), tmp_path, ["sft", "mine", "grpo"], gpus, gpu_memory)
    lines = [line for line in text.splitlines() if ": fits " in line or ": does not fit " in line]
    assert lines == [f"{stage}: fits {gpu_memory}.0 GB" for stage in ("sft", "mine", "grpo")]


def test_the_memory_of_adapters(tmp_path: Path) -> None:
    """Rank times inputs and outputs of 3B: q and o 2048 + 2048, k and v 2048 + 256, the MLP 2048 + 11008."""
    adapters = 36 * 32 * (2 * 4096 + 2 * 2304 + 3 * 13056)
    size = model_size(recipe("3b-lora"))
    assert size is not None
    assert size.adapters == adapters
    text = plan_of(recipe("3b-lora"), Path("r.yaml"), Path(), tmp_path, ["sft", "grpo"], 1, 24)
    assert "3.75 B parameters, adapters of 59.9 M parameters" in text
    # 2 bytes of a frozen weight, 22 of an adapter's; keys and values in bf16 of 128 rows, in buffers of 1,302 tokens
    assert text.count("(frozen weights 7.5 GB, adapters 1.3 GB, activations") == 2
    assert "(frozen weights 7.5 GB, adapters 1.3 GB, keys and values 6.1 GB, repeated for the heads 1.3 GB)" in text
    exact = recipe_with("3b-lora", sft={"precision": "fp32"})
    assert "(frozen weights 15.0 GB, adapters" in plan_of(exact, Path("r.yaml"), Path(), tmp_path, ["sft"], 1, 24)


@pytest.mark.parametrize(
    ("section", "keys", "change"),
    [
        ("sft", {"batch_size": 16}, "sft.batch_size: "),
        (
            "grpo",
            {"max_completion_length": 3072, "rollouts": {"max_rows": 128, "max_tokens": 32_768}},
            "grpo.rollouts.max_rows: 16 and grpo.rollouts.max_tokens: 4096",
        ),
        (
            "grpo",
            {"max_completion_length": 100_000, "rollouts": {"max_rows": 1, "max_tokens": 8192}},
            "grpo.max_completion_length: 50000",
        ),
    ],
)
def test_the_plan_names_what_makes_adapters_fit(
    section: str, keys: dict[str, Any], change: str, tmp_path: Path
) -> None:
    """Neither precision nor sharding makes frozen weights smaller."""
    text = plan_of(recipe_with("7b-lora", **{section: keys}), Path("r.yaml"), Path(), tmp_path, [section], 1, 24)
    assert f"{section}: does not fit 24.0 GB: set {change}" in text


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
