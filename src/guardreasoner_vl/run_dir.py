"""One run's folder: the resolved recipe, what each stage wrote, and refusal to mix two recipes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import RecipeError

if TYPE_CHECKING:
    from guardreasoner_vl.recipe import Recipe


def open_run_dir(path: str | Path, recipe: Recipe) -> Path:
    """Create the folder, or reopen it; raises `RecipeError` naming the keys if it holds another recipe."""
    folder = Path(path)
    stored = folder / "recipe.json"
    resolved = recipe.model_dump(mode="json")
    if stored.is_file():
        try:
            changed = changed_keys(json.loads(stored.read_text("utf-8")), resolved)
        except ValueError as error:
            raise RecipeError(f"{stored} is not JSON; give a new --out") from error
        if changed:
            raise RecipeError(
                f"{folder} holds a run with another recipe (changed: {', '.join(changed)}); "
                "give a new --out or restore the recipe"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(stored, resolved)
    return folder


def changed_keys(old: Any, new: Any, place: str = "") -> list[str]:
    """Dotted names of the keys whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            name
            for key in sorted({*old, *new})
            for name in changed_keys(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        ]
    return [] if old == new else [place]


def write_json(path: Path, content: Any) -> None:
    """Write whole or not at all, so that a kill leaves the old file."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    partial.replace(path)
