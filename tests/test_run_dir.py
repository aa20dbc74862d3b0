"""One run's folder holds one recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.recipe import Recipe, parse_recipe
from guardreasoner_vl.run_dir import changed_keys, open_run_dir, write_json


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({"name": "r", "model": {"path": "x"}, **changes})


def test_a_new_folder_holds_the_resolved_recipe(tmp_path: Path) -> None:
    folder = open_run_dir(tmp_path / "a" / "b", recipe(seed=3))
    stored = json.loads((folder / "recipe.json").read_text())
    assert stored["seed"] == 3
    assert stored["sft"]["max_length"] == 2048
    assert [path.name for path in folder.iterdir()] == ["recipe.json"]


def test_the_same_recipe_reopens(tmp_path: Path) -> None:
    first = open_run_dir(tmp_path, recipe())
    assert open_run_dir(str(tmp_path), recipe()) == first


def test_another_recipe_is_refused_and_its_keys_are_named(tmp_path: Path) -> None:
    open_run_dir(tmp_path, recipe())
    before = (tmp_path / "recipe.json").read_bytes()
    with pytest.raises(RecipeError) as caught:
        open_run_dir(tmp_path, recipe(seed=1, sft={"epochs": 1}, data={"drawn": {"count": 2}}))
    assert "(changed: data.drawn, seed, sft.epochs)" in str(caught.value)
    assert "give a new --out or restore the recipe" in str(caught.value)
    assert (tmp_path / "recipe.json").read_bytes() == before


def test_a_stored_recipe_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(RecipeError, match=r"recipe\.json is not JSON; give a new --out"):
        open_run_dir(tmp_path, recipe())


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a"]),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["a.c"]),
        ({"a": {"b": 1}}, {"a": None}, ["a"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a"]),
        ({}, {"a": None}, []),
        ({}, {"b": 1}, ["b"]),
        ({"b": 1}, {}, ["b"]),
    ],
)
def test_changed_keys(old: Any, new: Any, expected: list[str]) -> None:
    assert changed_keys(old, new) == expected


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
