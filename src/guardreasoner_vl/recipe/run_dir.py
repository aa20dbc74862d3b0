"""One run's folder: its recipe, what each stage has read of it, and refusal to mix two recipes or two processes.

OUT/recipe.json   the resolved recipe, as it was last
OUT/stages.json   for each stage that has begun, the keys that decide its result
OUT/.lock         while a process works in the folder
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.recipe.load import Recipe, merged
from guardreasoner_vl.storage.atomic import write_json
from guardreasoner_vl.storage.lock import locked_folder
from guardreasoner_vl.storage.resume import changed_keys

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

RECIPE, STAGES = "recipe.json", "stages.json"
ALL = "run"

_READ: dict[str, tuple[str, ...]] = {
    "curate": ("name", "seed", "data"),
    "synthesize": ("synthesize",),
    "sft": ("seed", "model", "data", "sft", "lora"),
    "mine": ("seed", "mine"),
    "augment": ("seed", "augment"),
    "grpo": ("seed", "grpo", "lora"),
}
"""What decides a stage's result. `evaluate` compares its own settings and rows (`stages.evaluate`)."""

_FREE = {
    "synthesize": ("base_url", "concurrency", "max_cost"),
    "sft": ("save_steps", "gradient_checkpointing", "shard_weights"),
    "mine": (
        "base_url",
        "keep",
        "max_rows",
        "max_tokens",
    ),  # `stages.mine` compares `keep` once a corpus was made by it
    "grpo": (
        "pass_tokens",
        "save_every",
        "gradient_checkpointing",
        "shard_weights",
        "rollouts.base_url",
        "rollouts.gpu_memory_utilization",
        "rollouts.max_rows",
        "rollouts.max_tokens",
    ),
}
"""Keys of a section that do not change the stage's result, only the way to it; a dot separates nested keys."""


@contextmanager
def open_run_dir(path: str | Path, recipe: Recipe, command: str) -> Iterator[Path]:
    """The folder, created or reopened, for `command` alone until the end; of several ranks the main one locks it.

    `command` is a stage, which then begins with this recipe, or `run`, which compares every stage that has begun.
    Raises `RecipeError` naming the keys if a compared stage has read other values, and `DataError` if another process
    has the folder.
    """
    folder = Path(path)
    with locked_folder(folder, command) if _is_main() else nullcontext(folder):
        begun = _begun(folder)
        _check_recipe(folder, begun, recipe, begun if command == ALL else (command,))
        if _is_main():  # stages first: in a folder with a recipe alone, every stage counts as having read it
            write_json(folder / STAGES, begun)
            write_json(folder / RECIPE, recipe.model_dump(mode="json"))
        if command != ALL:
            begin(folder, recipe, command)
        yield folder


def begin(folder: Path, recipe: Recipe, stage: str) -> None:
    """Note what the stage reads of the recipe, in an open folder. Raises `RecipeError` if it has read other values."""
    begun = _begun(folder)
    _check_recipe(folder, begun, recipe, (stage,))
    if _is_main() and stage in _READ:
        write_json(folder / STAGES, begun | {stage: _read_by(stage, recipe.model_dump(mode="json"))})


def _check_recipe(folder: Path, begun: dict[str, dict[str, Any]], recipe: Recipe, stages: Iterable[str]) -> None:
    resolved, defaults = (each.model_dump(mode="json") for each in (recipe, Recipe(name="defaults")))
    read = [  # a key that the earlier version lacked counts as its default
        (merged(_read_by(stage, defaults), begun[stage]), _read_by(stage, resolved))
        for stage in stages
        if stage in begun
    ]
    if changed := sorted({key for old, new in read for key in changed_keys(old, new)}):
        raise RecipeError(
            f"{folder} holds a run with another recipe (changed: {', '.join(changed)}); "
            "give a new --out or restore the recipe"
        )


def _is_main() -> bool:
    """Whether this process writes: the only one, or rank 0 of several."""
    return os.environ.get("RANK", "0") == "0"


def _read_by(stage: str, resolved: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved recipe that decides the stage's result."""
    free = _FREE.get(stage, ())
    return {
        name: _without_keys(resolved[name], free)
        if name == stage
        else resolved.get(name)  # an older recipe may lack a section
        for name in _READ.get(stage, ())
    }


def _without_keys(section: dict[str, Any], free: Collection[str]) -> dict[str, Any]:
    kept = {key: value for key, value in section.items() if key not in free}
    for part, _, key in (name.partition(".") for name in free):
        if key and part in kept:
            kept[part] = {name: value for name, value in kept[part].items() if name != key}
    return kept


def _begun(folder: Path) -> dict[str, dict[str, Any]]:
    """What each stage that has begun has read; without `stages.json`, all of them are taken to have read the recipe."""
    stages = _read_json_object(folder / STAGES)
    if stages is not None:
        return stages
    recipe = _read_json_object(folder / RECIPE)
    return {} if recipe is None else {stage: _read_by(stage, recipe) for stage in _READ}


def _read_json_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is not JSON; give a new --out") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} is not a JSON object; give a new --out")
    return content
