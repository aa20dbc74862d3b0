"""One run's folder holds one recipe."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from guardreasoner_vl.errors import DataError, RecipeError
from guardreasoner_vl.recipe import Recipe, parse_recipe
from guardreasoner_vl.recipe.run_dir import open_run_dir
from guardreasoner_vl.storage.atomic import write_json


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({"name": "r", "model": {"path": "x"}, **changes})


def test_a_new_folder_holds_the_resolved_recipe(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "a" / "b", recipe(seed=3), "sft") as folder:
        pass
    stored = json.loads((folder / "recipe.json").read_text())
    assert stored["seed"] == 3
    assert stored["sft"]["max_length"] == 2048
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.json", "stages.json"]


def test_the_same_recipe_reopens(tmp_path: Path) -> None:
    for _ in range(2):
        with open_run_dir(str(tmp_path), recipe(), "sft") as folder:
            assert folder == tmp_path


def test_another_recipe_is_refused_and_its_keys_are_named(tmp_path: Path) -> None:
    with open_run_dir(tmp_path, recipe(), "sft"):
        pass
    before = (tmp_path / "recipe.json").read_bytes()
    changed = recipe(seed=1, sft={"epochs": 1}, data={"synthetic_images": {"count": 2}})
    with pytest.raises(RecipeError) as caught, open_run_dir(tmp_path, changed, "sft"):
        pass
    assert "(changed: data.synthetic_images, seed, sft.epochs)" in str(caught.value)
    assert "give a new --out or restore the recipe" in str(caught.value)
    assert (tmp_path / "recipe.json").read_bytes() == before


def test_a_stored_recipe_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with (
        pytest.raises(RecipeError, match=r"recipe\.json is not JSON; give a new --out"),
        open_run_dir(tmp_path, recipe(), "sft"),
    ):
        pass


def opened(folder: Path, settings: Recipe, command: str = "run") -> None:
    with open_run_dir(folder, settings, command):
        pass


def test_a_stage_compares_what_it_has_read_itself(tmp_path: Path) -> None:
    opened(tmp_path, recipe(), "sft")
    later = recipe(grpo={"learning_rate": 1e-5, "evaluate_rows": 9}, evaluate={"limit": 3}, mine={"candidates": 2})
    opened(tmp_path, later)
    opened(tmp_path, later, "sft")
    opened(tmp_path, later, "grpo")
    with pytest.raises(RecipeError, match=r"\(changed: grpo\.evaluate_rows, grpo\.learning_rate\)"):
        opened(tmp_path, recipe(), "grpo")
    with pytest.raises(RecipeError, match=r"\(changed: grpo\.evaluate_rows, grpo\.learning_rate\)"):
        opened(tmp_path, recipe())
    with pytest.raises(RecipeError, match=r"\(changed: sft\.epochs\)"):
        opened(tmp_path, recipe(sft={"epochs": 1}, **later_keys(later)))
    opened(tmp_path, recipe(sft={"epochs": 1}, **later_keys(later)), "grpo")


def later_keys(settings: Recipe) -> dict[str, Any]:
    return {name: getattr(settings, name).model_dump(mode="json") for name in ("grpo", "evaluate", "mine")}


def test_keys_that_change_no_result_may_differ(tmp_path: Path) -> None:
    for stage in ("synthesize", "sft", "grpo"):
        opened(tmp_path, recipe(), stage)
    free = {
        "synthesize": {"concurrency": 2, "max_cost": 5.0, "base_url": "http://localhost:1/v1"},
        "sft": {"save_steps": 7, "gradient_checkpointing": True, "shard_weights": True},
        "grpo": {"pass_tokens": 512, "save_every": 3, "gradient_checkpointing": True, "shard_weights": True},
        "evaluate": {"limit": 3},
    }
    opened(tmp_path, recipe(**free))
    for stage in ("synthesize", "sft", "grpo"):
        opened(tmp_path, recipe(**free), stage)
    assert json.loads((tmp_path / "recipe.json").read_text())["grpo"]["pass_tokens"] == 512
    with pytest.raises(RecipeError, match=r"changed: synthesize\.votes"):
        opened(tmp_path, recipe(synthesize={"votes": 1}))


def test_where_vllm_runs_changes_no_result_and_what_samples_does(tmp_path: Path) -> None:
    served = {"engine": "vllm-server", "base_url": "http://localhost:1/v1"}
    opened(tmp_path, recipe(grpo={"rollouts": served}), "grpo")
    opened(tmp_path, recipe(grpo={"rollouts": {**served, "base_url": "http://localhost:2/v1"}}), "grpo")
    for other in ({}, {**served, "importance_cap": 2.0}):
        with pytest.raises(RecipeError, match=r"changed: grpo\.rollouts\."):
            opened(tmp_path, recipe(grpo={"rollouts": other}), "grpo")


def test_a_key_that_the_folder_s_version_did_not_have_has_its_default(tmp_path: Path) -> None:
    opened(tmp_path, recipe(), "grpo")
    stages = json.loads((tmp_path / "stages.json").read_text())
    del stages["grpo"]["lora"], stages["grpo"]["grpo"]["rollouts"]
    write_json(tmp_path / "stages.json", stages)
    for changes, name in (({"lora": {}}, "lora"), ({"grpo": {"rollouts": {"engine": "vllm-colocate"}}}, "grpo")):
        with pytest.raises(RecipeError, match=rf"changed: {name}"):
            opened(tmp_path, recipe(**changes), "grpo")
    opened(tmp_path, recipe(), "grpo")


def test_a_folder_of_an_earlier_version_keeps_its_recipe(tmp_path: Path) -> None:
    write_json(tmp_path / "recipe.json", recipe().model_dump(mode="json"))
    with pytest.raises(RecipeError, match=r"changed: grpo\.learning_rate"):
        opened(tmp_path, recipe(grpo={"learning_rate": 1e-5}))
    opened(tmp_path, recipe(grpo={"pass_tokens": 512}), "grpo")


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    messages: list[str] = []

    def second() -> None:
        try:
            opened(tmp_path, recipe(), "sft")
        except DataError as error:
            messages.append(str(error))

    with open_run_dir(tmp_path, recipe(), "grpo"):
        opened(tmp_path, recipe(), "sft")  # a stage of the same run
        thread = Thread(target=second)
        thread.start()
        thread.join()
    assert "another `grpo` (process" in messages[0]
    second()
    assert len(messages) == 1


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
