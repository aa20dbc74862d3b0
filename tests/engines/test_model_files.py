"""Where models are found, and which folders are refused before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from guardreasoner_vl.engines.model_files import check_folder, context_length, model_info, resolve_folder
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def copied(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def changed_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def refusal_of(folder: Path) -> str:
    """The one line with which the engine refuses the folder."""
    with pytest.raises(ModelError) as caught:
        TransformersEngine.load(str(folder), dtype="fp32")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path) -> Path:
    """An HF_HOME whose cache holds `owner/tiny`, laid out as the hub's client does."""
    repository = tmp_path / "home" / "hub" / "models--owner--tiny"
    copied(tiny_model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "home"


@pytest.mark.slow
def test_a_hub_id_comes_from_the_cache_under_hf_home(hub: Path) -> None:
    script = "from guardreasoner_vl.engines.model_files import resolve_folder; print(resolve_folder('owner/tiny'))"
    environment = os.environ | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == str(hub / "hub" / "models--owner--tiny" / "snapshots" / COMMIT)


def test_a_cached_hub_id_loads_offline(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    engine = TransformersEngine.load("owner/tiny", dtype="fp32")
    assert (engine.model.name, engine.model.revision) == ("owner/tiny", COMMIT)
    pinned = TransformersEngine.load("owner/tiny", COMMIT, dtype="fp32")
    assert pinned.model.revision == COMMIT


@pytest.mark.parametrize("model", ["owner/unknown", "owner/bad name", "owner/--", "own..er/x"])
def test_an_unknown_hub_id_is_refused_at_once(model: str, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    started = time.perf_counter()
    with pytest.raises(ModelError, match=r"not in the cache|no such repository") as caught:
        resolve_folder(model)
    assert time.perf_counter() - started < 5
    assert "\n" not in str(caught.value)


ASKED = httpx.Request("GET", "https://hub.example")


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        (GatedRepoError("403", response=httpx.Response(403, request=ASKED)), "accept the terms on the hub and log in"),
        (
            RepositoryNotFoundError("404", response=httpx.Response(404, request=ASKED)),
            "no such repository or revision on the hub",
        ),
        (
            RevisionNotFoundError("404", response=httpx.Response(404, request=ASKED)),
            "no such repository or revision on the hub",
        ),
        (httpx.ConnectError("unreachable"), r"the hub cannot be reached \(ConnectError\): check the network"),
    ],
)
def test_what_the_hub_refuses_is_said_with_a_remedy(
    fault: Exception, remedy: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> str:
        raise fault

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(ModelError, match=f"owner/unknown: .*{remedy}.*, or give a local folder"):
        resolve_folder("owner/unknown")


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./nothing", "nothing", "a/b/c", "~nobody-of-that-name/x", "a\0b"]
)
def test_a_missing_folder_is_refused(model: str) -> None:
    with pytest.raises(ModelError, match="hub id"):
        resolve_folder(model)


def test_local_folders_win_over_hub_ids(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(tiny_model, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("owner/name").samefile(tmp_path / "owner" / "name")


def test_the_revision_of_a_folder_follows_its_weights(tiny_model: Path, tmp_path: Path) -> None:
    first, again = (model_info(str(folder), folder) for folder in (tiny_model, copied(tiny_model, tmp_path / "same")))
    assert first.revision == again.revision
    weights = tmp_path / "same" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_info("x", tmp_path / "same").revision != first.revision


def test_weights_must_be_there_and_safetensors(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights are not read" in refusal_of(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "no .safetensors weights" in refusal_of(folder)


def test_an_index_that_names_pickled_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "pickled weights are not read" in refusal_of(folder)


def test_code_in_a_model_folder_never_runs(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: ...\n")
    targets = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoModelForImageTextToText", "AutoImageProcessor")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        changed_json(folder / name, auto_map=dict.fromkeys(targets, "evil.Evil"))
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    TransformersEngine.load(str(folder), dtype="fp32")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(TypeError, match="trust_remote_code"):
        TransformersEngine.load(str(folder), trust_remote_code=True)


def test_another_architecture_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    changed_json(folder / "config.json", model_type="llama")
    assert "a model of type 'llama'" in refusal_of(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", '"a"'])
def test_missing_and_broken_files_are_named(name: str, content: str | None, tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert name in refusal_of(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refusal_of(tmp_path)


@pytest.mark.parametrize(
    "values", [{"min_pixels": 5}, {"min_pixels": "many"}, {"min_pixels": None, "size": 7}, {"patch_size": "x"}]
)
def test_impossible_image_settings_are_refused(values: dict[str, object], tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    changed_json(folder / "preprocessor_config.json", **values)
    assert "preprocessor_config.json" in refusal_of(folder)


def test_a_tokenizer_of_another_family_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    text = (folder / "tokenizer.json").read_text("utf-8")
    (folder / "tokenizer.json").write_text(text.replace("<|image_pad|>", "<|other_pad|>"), "utf-8")
    assert "the tokenizer has no token <|image_pad|>" in refusal_of(folder)


def test_a_vocabulary_without_the_answers_tags_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    added, model = tokenizer["added_tokens"], tokenizer["model"]
    tokenizer["added_tokens"] = [one for one in added if one["special"] or "<" not in one["content"]]
    model["vocab"] = {piece: number for piece, number in model["vocab"].items() if "<" not in piece}
    model["merges"] = [pair for pair in model["merges"] if "<" not in "".join(pair)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    assert "cannot encode an answer's tags" in refusal_of(folder)


def test_broken_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    assert "cannot be loaded" in refusal_of(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert "cannot be loaded" in refusal_of(folder)


def test_weights_that_do_not_fill_the_model_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lacking = next(name for name in weights if name.endswith("mlp.down_proj.weight"))
    kept = {name: weight for name, weight in weights.items() if name != lacking}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert "1 weights are missing" in refusal_of(folder)
    save_file(kept | {lacking: weights[lacking][:-1].clone()}, folder / "model.safetensors", {"format": "pt"})
    assert refusal_of(folder)


def test_check_folder_gives_the_configuration(tiny_model: Path) -> None:
    assert check_folder(tiny_model)["model_type"] == "qwen2_5_vl"


@pytest.mark.parametrize(
    "config",
    [
        {"max_position_embeddings": 64},
        {"max_position_embeddings": 64, "text_config": None},
        {"max_position_embeddings": 64, "text_config": {}},
        {"max_position_embeddings": 32, "text_config": {"max_position_embeddings": 64}},
    ],
)
def test_the_context_is_the_text_models(config: dict[str, object]) -> None:
    assert context_length(config) == 64


@pytest.mark.parametrize("config", [{}, {"max_position_embeddings": "64"}, {"text_config": {"vocab_size": 64}}])
def test_a_configuration_without_a_context_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"no max_position_embeddings; download the model again$"):
        context_length(config)
