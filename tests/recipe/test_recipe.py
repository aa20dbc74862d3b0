"""Every recipe parses, and a mistake is named in one line with its remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.recipe import SAMPLES, load_recipe, parse_recipe
from guardreasoner_vl.sources.catalogue import adapter_named

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_parses(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for source in recipe.data.sources:
        known = adapter_named(source.adapter) if source.adapter != SAMPLES else source
        assert known.origin
        assert known.licence


def content(**changes: Any) -> dict[str, Any]:
    return {"name": "r", "model": {"path": "somewhere"}, **changes}


@pytest.mark.parametrize(
    ("changes", "place", "hint"),
    [
        ({"modle": {}}, "'modle'", "'model'"),
        ({"sft": {"epoch": 1}}, "'sft.epoch'", "'epochs'"),
        ({"sft": {"learning-rate": 1}}, "'sft.learning-rate'", "'learning_rate'"),
        ({"model": {"new": {"text": {"layer": 1}}}}, "'model.new.text.layer'", "'layers'"),
        ({"data": {"synthetic_images": {"counts": 1}}}, "'data.synthetic_images.counts'", "'count'"),
        (
            {"data": {"sources": [{"folder": "f", "origin": "o", "licence": "l", "licens": "l"}]}},
            "'data.sources.0.licens'",
            "'licence'",
        ),
        ({"batch_size": 1}, "'batch_size'", "'sft.batch_size'"),
        ({"sft": {"vocab_size": 600}}, "'sft.vocab_size'", "'model.new.vocab_size'"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(changes: dict[str, Any], place: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(content(**changes))
    text = str(caught.value)
    assert f"unknown key {place}; did you mean {hint}?" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("tracker", "names"),
    [
        ("none", ()),
        ("wandb", ("wandb",)),
        (["mlflow", "tensorboard"], ("mlflow", "tensorboard")),
        ([], ()),
    ],
)
def test_trackers_are_a_name_or_a_list(tracker: object, names: tuple[str, ...]) -> None:
    recipe = parse_recipe(content(tracker=tracker))
    assert recipe.tracker == names
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    assert parse_recipe(content()).tracker == ("tensorboard",)


@pytest.mark.parametrize("tracker", ["aim", ["none"], ["tensorboard", "aim"]])
def test_an_unknown_tracker_is_refused_with_the_known_ones(tracker: object) -> None:
    with pytest.raises(RecipeError, match=r"tracker\.\d should be 'tensorboard', 'wandb', 'trackio' or 'mlflow'"):
        parse_recipe(content(tracker=tracker))


def test_unknown_key_like_none_is_to_be_removed() -> None:
    with pytest.raises(RecipeError, match="unknown key 'zzzzqqqq'; remove it"):
        parse_recipe(content(zzzzqqqq=1))


@pytest.mark.parametrize("model", [{}, {"path": "x", "new": {}}])
def test_model_is_either_a_path_or_new(model: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"model: give one of `path` .*, `base` .* or `new`"):
        parse_recipe(content(model=model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"new": {"vocab_size": 100}}}, "model.new.vocab_size"),
        ({"model": {"new": {"min_pixels": 10}}}, "784 <= min_pixels <= max_pixels"),
        ({"model": {"new": {"min_pixels": 50_000, "max_pixels": 4_000}}}, "min_pixels <= max_pixels"),
        ({"model": {"new": {"text": {"hidden_size": 320, "heads": 6}}}}, "multiple of 2 x heads"),
        ({"model": {"new": {"text": {"heads": 5, "kv_heads": 2}}}}, "multiple of kv_heads"),
        ({"model": {"new": {"vision": {"hidden_size": 100}}}}, "multiple of 4 x heads"),
        ({"model": {"new": {"vision": {"layers": 2, "full_attention": [2]}}}}, "layers from 0 to 1"),
        ({"model": {"new": {"text": {"max_positions": 256}}}, "sft": {"max_length": 512}}, "max_positions"),
        ({"sft": {"precision": "fp16"}}, "sft.precision"),
        ({"sft": {"epochs": 0}}, "sft.epochs"),
        (
            {"sft": {"precision": "bf16-weights", "deepspeed": {"zero_optimization": {"stage": 3}}}},
            "use bf16 with deepspeed",
        ),
        (
            {
                "model": {"base": {"path": "w", "layers": 2, "vocab_size": 600, "max_positions": 64}},
                "sft": {"deepspeed": {"zero_optimization": {"stage": 3}}},
            },
            "take a new model apart before it is written: give model.path",
        ),
        (
            {
                "model": {"path": "w", "reading": {"images": 5}},
                "sft": {"deepspeed": {"zero_optimization": {"stage": 3}}},
            },
            "take the model apart before it learns to read: remove model.reading",
        ),
        ({"sft": {"shard_weights": True, "deepspeed": {"bf16": {}}}}, "shard_weights and deepspeed exclude each other"),
        ({"sft": {"shard_weights": True, "precision": "bf16-weights"}}, "use precision bf16, which computes in bf16"),
        ({"grpo": {"shard_weights": True, "precision": "bf16-weights"}}, "use precision bf16, which computes in bf16"),
        ({"grpo": {"rollouts": {"engine": "vllm-server"}}}, "engine: vllm-server and base_url belong together"),
        ({"grpo": {"rollouts": {"base_url": "http://a/v1"}}}, "engine: vllm-server and base_url belong together"),
        ({"grpo": {"rollouts": {"importance_cap": 2}}}, "importance_cap is for vLLM"),
        ({"data": {"sources": [{"folder": "f"}]}}, "data.sources.0: give origin and licence"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(content(**changes), "my.yaml")
    text = str(caught.value)
    assert text.startswith("my.yaml: ")
    assert message in text
    assert "\n" not in text


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nmodel: {path: x}\nsft: {learning_rate: 5e-5}\n")
    assert load_recipe(path).sft.learning_rate == 5e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "a recipe is a YAML mapping"),
        (b"- a\n- b\n", "a recipe is a YAML mapping"),
        (b"a: [1\nb: {", "; correct its syntax"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"model: {path: x}\n", "name is missing: give it"),
        (b"1: 2\nname: r\nmodel: {path: x}\n", "1"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot be read; give the path of a YAML recipe"):
        load_recipe(tmp_path / "nowhere.yaml")


def written(folder: Path, **recipes: str) -> Path:
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_recipe_may_extend_another(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        whole="name: whole\nseed: 3\nmodel: {path: a, reading: {images: 5}}\nsft: {epochs: 2, teacher: rules}\n",
        part="extends: whole.yaml\nname: part\nsft: {epochs: 1}\n",
        end="extends: part.yaml\nmodel: {path: null, reading: null, new: {vocab_size: 600}}\n",
    )
    end = load_recipe(folder / "end.yaml")
    assert (end.name, end.seed, end.sft.epochs, end.sft.teacher) == ("part", 3, 1, "rules")
    assert (end.base.path, end.base.reading) == (None, None)
    assert end.base.new is not None
    assert end.base.new.vocab_size == 600
    assert load_recipe(folder / "part.yaml").base.path == "a"


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"a": "extends: b.yaml", "b": "extends: a.yaml"}, "a.yaml, which extends it"),
        ({"a": "extends: a.yaml"}, "a.yaml, which extends it"),
        ({"a": "extends: gone.yaml"}, "gone.yaml: cannot be read"),
    ],
)
def test_a_recipe_that_cannot_be_extended(recipes: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, **recipes) / "a.yaml")


@pytest.mark.parametrize(
    ("changes", "place", "name"),
    [
        ({"model": {"path": "p", "reading": {"pictures": 4}}}, "model.reading.pictures", "model.reading.images"),
        (
            {"data": {"sources": [{"folder": "f", "origin": "o", "licence": "l", "picture": "a page"}]}},
            "data.sources.0.picture",
            "data.sources.0.image_kind",
        ),
        ({"data": {"drawn": {"count": 3}}}, "data.drawn", "data.synthetic_images"),
        ({"data": {"written": {"count": 3}}}, "data.written", "data.synthetic_exchanges"),
    ],
)
def test_a_renamed_key_names_the_new_one(changes: dict[str, Any], place: str, name: str) -> None:
    with pytest.raises(RecipeError, match=f"'{place}' was renamed: write '{name}'"):
        parse_recipe(content(**changes))
