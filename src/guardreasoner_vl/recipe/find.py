"""Finds a recipe file by its path, or by the name of a recipe that ships with the package."""

from __future__ import annotations

from pathlib import Path

from guardreasoner_vl.errors import RecipeError

_SUFFIXES = (".yaml", ".yml")
_PACKAGED = Path(__file__).parent / "shipped"
"""Where the wheel holds the repository's recipes (pyproject.toml)."""

_CHECKOUT = Path(__file__).parents[3] / "recipes"


def shipped_folder() -> Path:
    """The folder of the recipes that ship: inside the installed package, or the repository's in a checkout."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def shipped_names() -> list[str]:
    """The names of the recipes that ship, such as `smoke`, in alphabetical order."""
    return sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def find_recipe(recipe: str | Path) -> Path:
    """The recipe's file: `recipe` itself if it is a path, else the shipped recipe of that name.

    A name has neither a path separator nor the suffix `.yaml`; a file of that name comes first. Raises `RecipeError`
    for an unknown name; a path is not checked.
    """
    path = Path(recipe)
    if path.name != str(recipe) or path.suffix in _SUFFIXES or path.is_file():
        return path
    names = shipped_names()
    if path.name in names:
        return shipped_folder() / f"{path.name}.yaml"
    choices = f"use {', '.join(names)}, or give" if names else "give"
    raise RecipeError(f"no recipe named {path.name!r} ships with this package: {choices} the path of a YAML file")
