"""A recipe is found by its path or by the name of one that ships, in a checkout and in an installed package."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guardreasoner_vl.cli import app as cli
from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.recipe import find, load_recipe
from guardreasoner_vl.recipe.find import find_recipe, shipped_names

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


def test_every_recipe_of_the_repository_has_a_name() -> None:
    assert shipped_names() == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert "smoke" in shipped_names()


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_name_gives_the_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(find_recipe(name)) == load_recipe(RECIPES / f"{name}.yaml")
    assert find_recipe(Path(name)) == find_recipe(name)


def test_an_installed_package_holds_the_recipes_beside_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = tmp_path / "recipe" / "shipped"
    shutil.copytree(RECIPES, packaged)
    monkeypatch.setattr(find, "_PACKAGED", packaged)
    monkeypatch.setattr(find, "_CHECKOUT", tmp_path / "nowhere")
    assert find_recipe("3b-eco") == packaged / "3b-eco.yaml"
    assert load_recipe(find_recipe("3b-eco")).name == load_recipe(RECIPES / "3b-eco.yaml").name  # it extends another


def test_the_wheel_gets_the_recipes_where_they_are_looked_for() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included["recipes"] == "guardreasoner_vl/recipe/shipped"
    assert Path(find.__file__).parent / "shipped" == ROOT / "src" / "guardreasoner_vl" / "recipe" / "shipped"


@pytest.mark.parametrize("path", ["smoke.yaml", "smoke.yml", "folder/smoke", "./smoke", "/smoke", "../smoke"])
def test_a_path_stays_a_path(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(path) == Path(path)


def test_a_file_comes_before_a_name_but_a_folder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()
    assert find_recipe("smoke") == find.shipped_folder() / "smoke.yaml"
    (tmp_path / "3b").write_text("name: mine\n")
    assert load_recipe(find_recipe("3b")).name == "mine"


def test_an_unknown_name_lists_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RecipeError, match=r"no recipe named 'smok' ships .*: use 3b, 3b-eco, .*smoke.* or give the path"
    ):
        find_recipe("smok")
    monkeypatch.setattr(find, "_CHECKOUT", tmp_path)
    with pytest.raises(RecipeError, match="ships with this package: give the path of a YAML file"):
        find_recipe("smoke")


def test_commands_take_a_name(tmp_path: Path) -> None:
    def invoke(*arguments: object) -> str:
        result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        return f"{result.exit_code} {result.output}"

    planned = invoke("run", "smoke", "--out", tmp_path, "--plan")
    assert planned.startswith("0 recipe smoke, seed ")
    assert f"guardreasoner-vl run smoke --out {tmp_path}" in planned
    for command in (("sft",), ("run",), ("ablate",), ("mine",), ("augment",), ("base",), ("curate",)):
        needed = () if command[0] in ("run", "ablate", "base") else ("--data", tmp_path)
        assert invoke(*command, "smok", *needed, "--out", tmp_path / "x").startswith("2 error: no recipe named 'smok'")
