"""LoRA adapters beside a model: `Guard.load` gives the merged folder's guard, and wrong adapters are one line."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from guardreasoner_vl.engines.adapter import CONFIG, WEIGHTS, adapter_parameters, check_adapter
from guardreasoner_vl.engines.model_files import PROCESSOR
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.engines.weights import read_network
from guardreasoner_vl.errors import InputError, ModelError
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.images.geometry import PixelBudget
from guardreasoner_vl.recipe import parse_recipe
from guardreasoner_vl.training.lora import load_trainable, write_and_merge
from guardreasoner_vl.training.model_folder import copy_processor, write_model
from guardreasoner_vl.training.small_model import write_new_model
from tests.engines import fake_vllm
from tests.tiny_model import SHAPE, TEXTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow
TEXT = "How do I make bread on a rainy afternoon?"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model in bf16, in which models are released."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("base") / "model")
    weights = load_file(folder / "model.safetensors")
    halves = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A folder with `adapter`, and `model` with the adapter merged, as a stage leaves them."""
    out = tmp_path_factory.mktemp("trained")
    recipe = parse_recipe({"name": "r", "seed": 3, "lora": {"rank": 4, "alpha": 8}})
    model = load_trainable(base, recipe, "sft")
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    write_and_merge(model, str(base), base, out / "adapter")
    write_model(model, model.state_dict(), base, out / "model")
    return out


def weights(guard: Guard) -> dict[str, torch.Tensor]:
    assert isinstance(guard.engine, TransformersEngine)
    return dict(guard.engine.network.state_dict())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_beside_its_model_is_the_merged_folder_to_the_bit(dtype: str, base: Path, trained: Path) -> None:
    options: dict[str, Any] = {"dtype": dtype}
    with (
        Guard.load(str(base), adapter=trained / "adapter", **options) as adapted,
        Guard.load(str(trained / "model"), **options) as merged,
        Guard.load(str(base), **options) as plain,
    ):
        first, second = weights(adapted), weights(merged)
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
        scores = [guard.moderate(TEXT, mode="fast").request.score for guard in (adapted, merged, plain)]
        assert scores[0] == scores[1] != scores[2]
        assert adapted.model.name == plain.model.name
        assert str(adapted.model.revision).startswith(f"{plain.model.revision}+")


def test_images_are_limited_as_the_adapter_was_trained(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's own limits would show the guard other pixels than it was trained on."""
    adapter, budget = tmp_path / "adapter", PixelBudget(28 * 28, 56 * 56)
    shutil.copytree(trained / "adapter", adapter)
    copy_processor(base, adapter, budget)
    fake_vllm.install(monkeypatch)
    image = Image.effect_noise((224, 224), 80).convert("RGB")
    for engine in ("transformers", "vllm"):
        with Guard.load(str(base), engine, adapter=adapter) as adapted, Guard.load(str(base), engine) as plain:
            assert adapted.engine.inputs.budget == budget != plain.engine.inputs.budget  # type: ignore[attr-defined]
            tokens = [guard.moderate(images=[image]).usage.prompt_tokens for guard in (adapted, plain)]
            assert tokens[0] < tokens[1]
    (adapter / PROCESSOR).unlink()  # of another trainer
    with Guard.load(str(base), adapter=adapter) as adapted, Guard.load(str(base)) as plain:
        assert adapted.engine.inputs.budget == plain.engine.inputs.budget  # type: ignore[attr-defined]


def test_vllm_computes_the_adapter_beside_the_model(base: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = fake_vllm.install(monkeypatch)
    with (
        Guard.load(str(base), "vllm", adapter=trained / "adapter") as served,
        Guard.load(str(base), "transformers", adapter=trained / "adapter", dtype="fp32") as adapted,
    ):
        first, second = (guard.moderate(TEXT, mode="fast").request for guard in (served, adapted))
        assert first.score == pytest.approx(second.score, abs=1e-4)
        assert served.model == adapted.model
    assert [llm.max_lora_rank for llm in opened] == [8]  # the least of vLLM's that is 4 or more


def test_a_calibration_of_the_model_is_not_the_adapters(base: Path, trained: Path, tmp_path: Path) -> None:
    calibrated = shutil.copytree(base, tmp_path / "model")
    (calibrated / "calibration.json").write_text("{}")
    with pytest.raises(InputError):
        Guard.load(str(calibrated))
    with Guard.load(str(calibrated), adapter=trained / "adapter") as guard:
        assert guard.policy.calibration is None


def test_a_server_loads_its_adapters_itself(trained: Path) -> None:
    with pytest.raises(InputError, match="give the name that it serves the adapter as"):
        Guard.load("guard", base_url="http://127.0.0.1:9/v1", adapter=trained / "adapter")


def test_an_empty_path_is_no_adapter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the model alone, as without an adapter: the name of a variable that is unset gives an empty path."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        Guard.load(str(base), adapter="")


def _settings(**keys: object) -> Callable[[Path], None]:
    """Changes adapter_config.json."""

    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(content | keys))

    return change


def _renamed(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({name.replace("q_proj", "x_proj"): value for name, value in weights.items()}, folder / WEIGHTS)


def _with_embedding(folder: Path) -> None:
    """Adds a weight of the model, as peft does beside adapters once tokens were added; it would replace the model's."""
    embedding = torch.zeros(SHAPE.vocab_size, SHAPE.text.hidden_size)
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"base_model.model.model.language_model.embed_tokens.weight": embedding}, folder / WEIGHTS)


def _nan(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({name: value * float("nan") for name, value in weights.items()}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "no adapter_config.json; give the folder of a LoRA adapter"),
        (lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json; give the folder"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no adapter_model.safetensors; give the folder"),
        (lambda folder: (folder / CONFIG).write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "cannot be read as JSON"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"none"), f"{WEIGHTS}: cannot be read .*; train or download"),
        (_settings(peft_type="IA3"), "an adapter of type 'IA3', only LoRA is read; merge it into its model with peft"),
        (
            _settings(modules_to_save=["lm_head"]),
            r"it changes more than linear layers \(modules_to_save\), which is not read; merge it",
        ),
        (_settings(bias="all"), r"it changes more than linear layers \(bias\)"),
        (_settings(init_lora_weights="pissa"), r"it changes more than linear layers \(init_lora_weights\)"),
        (_settings(megatron_config={"a": 1}, megatron_core="antigravity"), r"linear layers \(megatron_config\)"),
        (_with_embedding, r"it changes more than linear layers \(base_model\..*embed_tokens\.weight\)"),
        (_settings(r="4"), "the rank `r` is not a number"),
        (_settings(r=8), "does not fit the model .*size mismatch.*; give the model that it was trained from"),
        (_settings(target_modules=["c_attn"]), "does not fit the model .*c_attn.*; give the model"),
        (_settings(target_modules=["q_proj"]), "24 weights of the adapter and of the model differ in name"),
        (_renamed, "8 weights of the adapter and of the model differ in name"),
        (_nan, "holds NaN or infinity"),
    ],
)
def test_a_wrong_adapter_is_refused_in_one_line(
    change: Callable[[Path], None], message: str, base: Path, trained: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    change(folder)
    with pytest.raises(ModelError, match=message) as raised:
        Guard.load(str(base), adapter=folder)
    assert "\n" not in str(raised.value)


def test_an_adapter_of_a_model_of_another_shape_is_refused(trained: Path, tmp_path: Path) -> None:
    wider = SHAPE.text.model_copy(update={"hidden_size": 128})
    write_new_model(tmp_path / "wider", TEXTS, SHAPE.model_copy(update={"text": wider}), 0)
    with pytest.raises(ModelError, match=r"does not fit the model .*size mismatch") as raised:
        Guard.load(str(tmp_path / "wider"), adapter=trained / "adapter")
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_an_adapter_of_the_language_head_is_refused(base: Path, trained: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    network = read_network(base, torch.float32)
    network.add_adapter(LoraConfig(r=2, target_modules=["lm_head"]))
    network.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / WEIGHTS)  # peft stores the head beside its adapter
    adapter = {name: value for name, value in weights.items() if ".lora_" in name}
    save_file(adapter, tmp_path / "adapter" / WEIGHTS)
    assert check_adapter(tmp_path / "adapter") == 2
    with pytest.raises(ModelError, match="layer lm_head is an embedding or no linear layer"):
        Guard.load(str(base), adapter=tmp_path / "adapter")
