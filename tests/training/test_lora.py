"""LoRA: gradients beside a hand-written reference, what is trained in which precision, targets, the merged model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from guardreasoner_vl.corpus.store import read_corpus
from guardreasoner_vl.engines.adapter import WEIGHTS, adapted_layers, adapter_parameters, load_adapter
from guardreasoner_vl.engines.model_files import PROCESSOR
from guardreasoner_vl.errors import ModelError, RecipeError
from guardreasoner_vl.images.sizes import ImageSizes
from guardreasoner_vl.recipe import GrpoSection, LoraSection, Recipe, parse_recipe
from guardreasoner_vl.rl.shared_prefix import use_shared_prefix
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.training import lora
from guardreasoner_vl.training.grpo.update import Passes, PolicyNetwork, accumulate
from guardreasoner_vl.training.lora import load_trainable, write_and_merge
from guardreasoner_vl.training.model_folder import load_for_training
from guardreasoner_vl.training.sft_data import target_labels, tokenise
from guardreasoner_vl.training.sft_trainer import PlainInputs, build_trainer, sft_config
from tests.training import toy
from tests.training.grpo import toy_grpo
from tests.training.grpo.test_update import group

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from guardreasoner_vl.engines.qwen import QwenInputs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
LORA = LoraSection(rank=4, alpha=12)
SCALE = 3.0


def recipe(precision: str = "fp32", **keys: Any) -> Recipe:
    """A recipe with adapters; `keys` are those of `lora`."""
    sections = {"sft": {**toy.SFT, "precision": precision}, "grpo": {**toy_grpo.GRPO, "precision": precision}}
    return parse_recipe({"name": "toy", "seed": 1, "lora": LORA.model_dump() | keys, **sections})


def filled(model: Any, seed: int = 0) -> Any:
    """The model with adapters as after some training: B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def sft_backward(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, inputs: QwenInputs) -> Callable[..., None]:
    """Computes the gradient of SFT's loss on two rows of text and two with images."""
    root = toy.write_data(tmp_path_factory.mktemp("sft"), toy.rows(8))
    samples = list(read_samples(root / "toy" / "train.jsonl"))[2:6]
    labels = target_labels(samples)
    rows = tokenise(
        samples,
        labels,
        inputs,
        max_length=400,
        without_reasoning=0.5,
        teacher="rules",
        seed=0,
        sizes=ImageSizes(),
    ).rows
    assert [bool(row.images) for row in rows] == [False, False, True, True]

    def backward(model: Any) -> None:
        config = sft_config(recipe().sft, root / "out", seed=0, use_cpu=True)
        trainer = build_trainer(model, rows, inputs, config, tiny_model)
        content = [{"input_ids": row.input_ids, "labels": row.labels, "image_paths": row.images} for row in rows]
        trainer.compute_loss(model, trainer.data_collator(content)).backward()

    return backward


@pytest.fixture(scope="module")
def grpo_backward(tmp_path_factory: pytest.TempPathFactory, inputs: QwenInputs) -> Callable[..., None]:
    """Computes the gradient of an update of RL on a group of text and one with an image."""
    rows = list(read_corpus(toy_grpo.write_rows(tmp_path_factory.mktemp("rows"), 8)))
    groups = [group(rows[place], inputs, place) for place in (0, 4)]
    section = GrpoSection(group_size=4, precision="fp32")

    def backward(model: Any) -> None:
        use_shared_prefix(model)
        accumulate(PolicyNetwork(model), Passes(inputs, section, torch.device("cpu")).of(groups, 8), None, 0.2, section)

    return backward


@pytest.mark.parametrize("start", ["B is zero", "B is not"])
@pytest.mark.parametrize("loss", ["sft_backward", "grpo_backward"])
def test_gradients_are_those_of_the_formula(
    start: str, loss: str, tiny_model: Path, request: pytest.FixtureRequest
) -> None:
    """With W' = W + s B A in a plain model: dA = s B^T dW' and dB = s dW' A^T."""
    backward: Callable[[Any], None] = request.getfixturevalue(loss)
    adapted = load_trainable(tiny_model, recipe(targets=(*LORA.targets, "visual.qkv")), "sft")
    plain = load_for_training(tiny_model, "fp32")
    if start == "B is not":
        filled(adapted)
    layers = {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in adapted_layers(adapted)
    }
    with torch.no_grad():
        for name, (a, b) in layers.items():
            plain.get_submodule(name).weight += SCALE * b @ a
    backward(adapted)
    backward(plain)
    assert len(layers) == 2 * 7 + 2
    for name, (a, b) in layers.items():
        of_weight = plain.get_submodule(name).weight.grad
        assert of_weight.abs().max() > 1e-6, name
        with torch.no_grad():
            pairs = ((a.grad, SCALE * b.T @ of_weight), (b.grad, SCALE * of_weight @ a.T))
        for computed, formula in pairs:
            assert float((computed - formula).norm()) <= 1e-5 * float(formula.norm()), name
    trained = {id(parameter) for pair in layers.values() for parameter in pair}
    assert {id(parameter) for parameter in adapted.parameters() if parameter.grad is not None} == trained


@pytest.mark.parametrize(
    ("precision", "frozen", "trained"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("bf16-weights", torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapters_alone_are_trained(
    precision: str, frozen: torch.dtype, trained: torch.dtype, tiny_model: Path
) -> None:
    model = load_trainable(tiny_model, recipe(precision=precision), "grpo")
    adapters = {id(one) for one in adapter_parameters(model)}
    assert {id(one) for one in model.parameters() if one.requires_grad} == adapters
    assert {one.dtype for one in adapter_parameters(model)} == {trained}
    assert {one.dtype for one in model.parameters() if id(one) not in adapters} == {frozen}
    assert sum(one.numel() for one in adapter_parameters(model)) == lora.adapter_size(
        load_for_training(tiny_model, "fp32"), LORA
    )


def test_equal_seeds_give_equal_adapters_and_dropout_is_of_sft(tiny_model: Path) -> None:
    before = torch.random.get_rng_state()
    first = load_trainable(tiny_model, recipe(dropout=0.5), "sft")
    second = load_trainable(tiny_model, recipe(dropout=0.5), "grpo")
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = list(zip(adapter_parameters(first), adapter_parameters(second), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)
    assert any(one.any() for one, _ in pairs)
    dropped = [
        sum(isinstance(module, torch.nn.Dropout) for _, layer in adapted_layers(model) for module in layer.modules())
        for model in (first, second)
    ]
    assert dropped == [14, 0]


def test_targets_name_layers_of_the_language_model_or_of_the_tower(tiny_model: Path) -> None:
    model = load_for_training(tiny_model, "fp32")
    names = lora.adapted_names(model, ("up_proj", "visual.qkv", "visual.attn.proj"))
    blocks = [f"model.visual.blocks.{number}.attn.{part}" for number in (0, 1) for part in ("qkv", "proj")]
    assert names == [*blocks, *(f"model.language_model.layers.{number}.mlp.up_proj" for number in (0, 1))]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("lm_head", r"lora\.targets: lm_head names no layer; use q_proj, .*, down_proj, visual\.qkv, "),
        ("proj", r"lora\.targets: proj names no layer"),
        ("visual.q_proj", r"lora\.targets: visual\.q_proj names no layer"),
        (
            "visual.proj",
            r"visual\.proj names model\.visual\.patch_embed\.proj, which is not linear; use .*, visual\.attn\.proj, ",
        ),
        ("embed_tokens", r"embed_tokens names model\.language_model\.embed_tokens, which is not linear"),
    ],
)
def test_targets_that_are_no_linear_layers(target: str, message: str, tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_trainable(tiny_model, recipe(targets=("q_proj", target)), "sft")


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("sft", {"deepspeed": {"zero_optimization": {"stage": 2}}}, r"remove sft\.deepspeed"),
        ("grpo", {"shard_weights": True}, r"remove grpo\.shard_weights"),
        ("grpo", {"freeze_vision": True}, r"lora\.targets has visual\.qkv, but grpo\.freeze_vision is true"),
        ("lora", {"rank": 0}, r"lora\.rank"),
    ],
)
def test_what_does_not_go_with_adapters(section: str, keys: dict[str, Any], message: str) -> None:
    content: dict[str, Any] = {"name": "r", "lora": {"targets": ["q_proj", "visual.qkv"]}}
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**content, section: {**content.get(section, {}), **keys}})


def test_a_frozen_tower_gets_no_gradient_under_checkpointing(tiny_model: Path, inputs: QwenInputs) -> None:
    """Transformers makes its inputs require gradients then, and activations would be kept for all of it."""
    model = load_trainable(tiny_model, recipe(), "sft")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    pixels, grid = torch.rand(16, 1176), torch.tensor([[1, 4, 4]])
    assert model.model.visual(pixels, grid_thw=grid).pooler_output.requires_grad
    PlainInputs().on_train_begin(None, None, None, model=model)
    assert not model.model.visual(pixels, grid_thw=grid).pooler_output.requires_grad


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights"])
def test_the_merged_model_computes_what_the_adapted_does(precision: str, tiny_model: Path, tmp_path: Path) -> None:
    model = filled(load_trainable(tiny_model, recipe(precision=precision), "sft")).eval()
    halves = load_for_training(tiny_model, "bf16-weights")  # W in bf16, as in a finished folder
    for name, layer in adapted_layers(model):
        layer.get_base_layer().weight.data.copy_(halves.get_submodule(name).weight)
    ids = torch.arange(20, 60)[None]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = model.float()(input_ids=ids).logits
        return output

    adapted = logits()
    write_and_merge(model, "owner/base", tiny_model, tmp_path / "adapter")
    assert not list(adapted_layers(model))
    merged = logits()
    assert float((merged - adapted).abs().max()) < 0.02 * float(adapted.abs().max())
    plain = load_for_training(tiny_model, "fp32").eval()
    with torch.no_grad():
        start = plain(input_ids=ids).logits
    assert float((start - adapted).abs().max()) > 0.2 * float(adapted.abs().max())


def test_adapters_are_written_as_peft_reads_them(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftConfig, PeftModel

    model = filled(load_trainable(tiny_model, recipe(), "sft")).eval()
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
    write_and_merge(model, "owner/base", tiny_model, tmp_path / "adapter")
    settings = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (settings.base_model_name_or_path, settings.r, settings.lora_alpha) == ("owner/base", 4, 12)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", WEIGHTS, PROCESSOR}
    read = PeftModel.from_pretrained(load_for_training(tiny_model, "fp32"), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(read(input_ids=ids).logits, adapted)


def test_stored_adapters_are_loaded_exactly(tiny_model: Path, tmp_path: Path) -> None:
    model, other = (load_trainable(tiny_model, recipe(), "sft") for _ in range(2))
    filled(model).save_pretrained(tmp_path / "checkpoint")
    assert len(load_file(tmp_path / "checkpoint" / WEIGHTS)) == 2 * 14
    load_adapter(other, tmp_path / "checkpoint")
    pairs = zip(adapter_parameters(model), adapter_parameters(other), strict=True)
    assert all(torch.equal(one, another) for one, another in pairs)


def test_a_broken_adapter_is_not_merged(tiny_model: Path, tmp_path: Path) -> None:
    model = load_trainable(tiny_model, recipe(), "sft")
    adapter_parameters(model)[1].data.fill_(float("nan"))
    with pytest.raises(ModelError, match="holds NaN or infinity: train it again"):
        write_and_merge(model, "owner/base", tiny_model, tmp_path / "adapter")
