"""Models in half the room: what is written, that all paths read it, and the way back."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

from guardreasoner_vl.cli import app as cli
from guardreasoner_vl.cli.errors import ERROR
from guardreasoner_vl.engines.int8 import INT8_WEIGHTS, METADATA, SCALE
from guardreasoner_vl.engines.model_files import check_folder, folder_digest
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.engines.weights import load_network
from guardreasoner_vl.errors import DataError, InputError, ModelError
from guardreasoner_vl.protocol import CANDIDATES, FAST_PREFIX
from guardreasoner_vl.recipe import Recipe
from guardreasoner_vl.stages import sft
from guardreasoner_vl.training.compact import compact, expand
from guardreasoner_vl.training.model_folder import load_for_training
from tests.engines.conformance import SLOTS, asked, with_image
from tests.engines.test_model_files import changed_json, copied
from tests.training import toy

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

pytestmark = pytest.mark.slow
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def back(int8_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bf16 again."""
    folder = tmp_path_factory.mktemp("expanded") / "back"
    expand(int8_model, folder)
    return folder


def logits(network: Any) -> torch.Tensor:
    ids = torch.arange(20, 60).view(2, 20)
    with torch.no_grad():
        values: torch.Tensor = network(input_ids=ids).logits
    return values.float()


# --- writing ------------------------------------------------------------------------------------------


def test_matrices_are_int8_and_everything_else_is_bf16(tiny_model: Path, int8_model: Path) -> None:
    before, after = load_file(tiny_model / "model.safetensors"), load_file(int8_model / INT8_WEIGHTS)
    matrices = {name for name, weight in before.items() if weight.dim() == 2}
    assert {EMBEDDING, "visual.blocks.0.attn.qkv.weight"} < matrices
    assert "visual.patch_embed.proj.weight" in before.keys() - matrices
    assert after.keys() == before.keys() | {name + SCALE for name in matrices}
    for name, weight in before.items():
        assert after[name].shape == weight.shape
        if name in matrices:
            assert after[name].dtype == torch.int8
            assert after[name + SCALE].shape == (len(weight), 1)
        else:
            assert torch.equal(after[name], weight.to(torch.bfloat16))


def test_the_file_names_its_scheme_and_is_smaller(
    tiny_model: Path, int8_model: Path, back: Path, tmp_path: Path
) -> None:
    report = compact(tiny_model, tmp_path / "again")
    with safe_open(int8_model / INT8_WEIGHTS, "pt") as file:
        assert file.metadata() == METADATA
    assert report.before == (tiny_model / "model.safetensors").stat().st_size
    assert report.after == (int8_model / INT8_WEIGHTS).stat().st_size
    assert report.after < 0.7 * (back / "model.safetensors").stat().st_size  # the tiny model is narrow, so scales count
    assert 0.004 < report.error < 0.02


def test_everything_beside_the_weights_is_the_same(tiny_model: Path, int8_model: Path, back: Path) -> None:
    copies = {path.name: path.read_bytes() for path in tiny_model.iterdir() if path.suffix == ".json"}
    neutral = {"do_sample": False, "repetition_penalty": 1.0}
    for folder, weights in ((int8_model, INT8_WEIGHTS), (back, "model.safetensors")):
        assert {path.name for path in folder.iterdir()} == {*copies, weights}
        assert all((folder / name).read_bytes() == copies[name] for name in copies if name != "generation_config.json")
        assert neutral.items() <= json.loads((folder / "generation_config.json").read_text()).items()
        assert check_folder(folder)["model_type"] == "qwen2_5_vl"


def test_the_same_model_gives_the_same_bytes(tiny_model: Path, int8_model: Path, back: Path, tmp_path: Path) -> None:
    for number in range(3):
        compact(tiny_model, tmp_path / f"small-{number}")
        expand(int8_model, tmp_path / f"back-{number}")
        for first, again in ((int8_model, f"small-{number}"), (back, f"back-{number}")):
            for path in first.iterdir():
                assert (tmp_path / again / path.name).read_bytes() == path.read_bytes()
            assert folder_digest(first) == folder_digest(tmp_path / again)


def test_a_model_in_parts_becomes_one_file(tiny_model: Path, int8_model: Path, tmp_path: Path) -> None:
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    folder = copied(tiny_model, tmp_path / "parts")
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    report = compact(folder, tmp_path / "whole")
    assert report.before == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    whole, expected = load_file(tmp_path / "whole" / INT8_WEIGHTS), load_file(int8_model / INT8_WEIGHTS)
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], expected[name]) for name in whole)
    assert not list((tmp_path / "whole").glob("*.index.json"))


def test_a_tied_head_is_stored_once(tiny_model: Path, int8_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {HEAD: weights[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})
    compact(folder, tmp_path / "tied")
    assert (tmp_path / "tied" / INT8_WEIGHTS).read_bytes() == (int8_model / INT8_WEIGHTS).read_bytes()
    network = load_network(tmp_path / "tied", "fp32")
    assert network.lm_head.weight is network.get_input_embeddings().weight

    save_file(weights | {HEAD: weights[EMBEDDING] + 1}, folder / "model.safetensors", {"format": "pt"})
    changed_json(folder / "config.json", tie_word_embeddings=False, text_config=_untied(folder))
    compact(folder, tmp_path / "untied")
    network = load_network(tmp_path / "untied", "fp32")
    assert not torch.equal(network.lm_head.weight, network.get_input_embeddings().weight)


def _untied(folder: Path) -> dict[str, Any]:
    text: dict[str, Any] = json.loads((folder / "config.json").read_text())["text_config"]
    return text | {"tie_word_embeddings": False}


# --- reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_is_loaded_is_what_is_stored_times_its_scale(int8_model: Path, dtype: str) -> None:
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
    stored = load_file(int8_model / INT8_WEIGHTS)
    networks = [load_network(int8_model, "bf16" if dtype == "bf16" else "fp32")]
    networks.append(load_for_training(int8_model, "bf16-weights" if dtype == "bf16" else "fp32"))
    for network in networks:
        weights = network.state_dict()
        assert all(weight.dtype == wanted for weight in weights.values())
        assert len({id(weight) for weight in network.parameters()}) == len([n for n in stored if SCALE not in n])
        for name, numbers in stored.items():
            if not name.endswith(SCALE):
                inner = name if name in weights else name.replace("model.", "model.language_model.", 1)
                inner = inner if inner in weights else f"model.{name}"
                scale = stored.get(name + SCALE, torch.ones(1)).double()
                assert torch.equal(weights[inner], (numbers.double() * scale).float().to(wanted)), name


def test_plain_transformers_reads_the_expanded_folder_alike(int8_model: Path, back: Path) -> None:
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(back, dtype=torch.bfloat16)
    network = load_network(int8_model, "bf16")
    assert plain.config.to_dict() | {"_name_or_path": str(int8_model)} == network.config.to_dict()
    assert plain.generation_config.to_dict() == network.generation_config.to_dict()
    weights, loaded = plain.state_dict(), network.state_dict()
    assert weights.keys() == loaded.keys()
    assert all(torch.equal(weights[name], loaded[name]) for name in weights)
    assert not network.training


def test_plain_transformers_refuses_a_compact_folder(int8_model: Path) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors"):
        Qwen2_5_VLForConditionalGeneration.from_pretrained(int8_model)


def test_logits_are_close_to_the_originals(tiny_model: Path, int8_model: Path) -> None:
    original, compacted = (logits(load_network(folder, "fp32")) for folder in (tiny_model, int8_model))
    assert 0 < (compacted - original).norm() / original.norm() < 0.05


def test_the_engine_gives_nearly_the_same_scores(tiny_model: Path, int8_model: Path) -> None:
    request = with_image(asked(forced_prefix=FAST_PREFIX))
    engines = [TransformersEngine.load(str(folder), dtype="fp32") for folder in (tiny_model, int8_model)]
    scores = [engine.score([request], SLOTS, CANDIDATES)[0] for engine in engines]
    assert [score.error for score in scores] == [None, None]
    original, compacted = (torch.tensor(score.logprobs).exp() for score in scores)
    assert 0 < (compacted - original).abs().max() < 0.1
    assert engines[0].model.revision != engines[1].model.revision


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_training_starts_from_a_compact_folder_and_writes_a_plain_one(int8_model: Path, tmp_path: Path) -> None:
    content = toy.recipe(epochs=1).model_dump()
    recipe = Recipe.model_validate({**content, "model": {"path": str(int8_model)}})
    finished = sft.run(recipe, toy.write_data(tmp_path / "data", toy.rows(4)), tmp_path / "out")
    assert (finished / "model.safetensors").is_file()
    assert not (finished / INT8_WEIGHTS).exists()
    trained = Qwen2_5_VLForConditionalGeneration.from_pretrained(finished, dtype=torch.float32).state_dict()
    start = load_network(int8_model, "fp32").state_dict()
    moved = [
        (trained[name] - start[name]).norm() / start[name].norm() for name in start if name.endswith("_proj.weight")
    ]
    assert max(moved) > 1e-3
    assert max(moved) < 0.5  # it went on from there


# --- what is refused ----------------------------------------------------------------------------------


def test_folders_that_will_not_do_are_refused(tiny_model: Path, int8_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ModelError, match="stored as int8 already"):
        compact(int8_model, target)
    with pytest.raises(ModelError, match="not stored as int8; use the folder as it is"):
        expand(tiny_model, target)
    with pytest.raises(ModelError, match=r"no config\.json"):
        compact(tmp_path, target)
    folder = copied(tiny_model, tmp_path / "quantised")
    changed_json(folder / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ModelError, match="quantised by another scheme"):
        compact(folder, target)
    assert not target.exists()


def test_a_folder_that_holds_something_is_not_replaced(tiny_model: Path, int8_model: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    for write, source in ((compact, tiny_model), (expand, int8_model)):
        for target in (tmp_path, tmp_path / "kept.txt", source):
            with pytest.raises(InputError, match="exists already; give the name of a new folder"):
                write(source, target)
    assert (tmp_path / "kept.txt").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    assert compact(tiny_model, tmp_path / "empty").after


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights[EMBEDDING][3, 5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"{EMBEDDING} holds NaN or infinity"):
        compact(folder, tmp_path / "out")


def test_broken_weights_are_refused(tiny_model: Path, int8_model: Path, tmp_path: Path) -> None:
    for write, source, name in ((compact, tiny_model, "model.safetensors"), (expand, int8_model, INT8_WEIGHTS)):
        folder = copied(source, tmp_path / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
        with pytest.raises(ModelError, match=r"its weights cannot be read .*; download it again") as caught:
            write(folder, tmp_path / "out")
        assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_nothing_half_written(tiny_model: Path, int8_model: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write, source in ((compact, tiny_model), (expand, int8_model)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
        try:
            with pytest.raises(DataError, match="make room; the same command resumes from the start"):
                write(source, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not (tmp_path / "out").exists()
        write(source, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


# --- the command --------------------------------------------------------------------------------------


def test_the_command_writes_both_ways_and_says_what_it_cost(
    tiny_model: Path, int8_model: Path, back: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(cli.app, ["compact", str(tiny_model), "--out", str(tmp_path / "small")])
    again = CliRunner().invoke(cli.app, ["compact", str(int8_model), "--expand", "--out", str(tmp_path / "back")])
    assert "MB of weights became" in result.stdout
    assert "relative error" in result.stdout
    assert again.stdout.endswith(f" MB; {tmp_path / 'back'}\n")
    for folder, written in ((int8_model, "small"), (back, "back")):
        assert folder_digest(tmp_path / written) == folder_digest(folder)
    refused = CliRunner().invoke(cli.app, ["compact", str(int8_model), "--out", str(tmp_path / "other")])
    assert refused.exit_code == ERROR
    assert refused.stderr.count("\n") == 1
    assert "--expand gives bf16" in refused.stderr
