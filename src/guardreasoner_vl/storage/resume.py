"""A long job resumes only with the inputs that it began with: settings, model, rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.storage.atomic import write_json

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path


def check_inputs(
    path: Path, run: str, inputs: Mapping[str, Any], free: Collection[str] = (), out: Path | None = None
) -> None:
    """Compare a run's inputs with those in the JSON file `path`, which it began with; then write them there.

    `run` names the run in messages, such as "an evaluation". Keys of `free` may change. `out` is the run's output, by
    default the file's folder. Raises `DataError` naming the keys that changed, or if the file cannot be read.
    """
    resolved = json.loads(json.dumps(inputs))  # as JSON is read back: lists for tuples
    if path.is_file():
        refuse_changed(out or path.parent, run, read_inputs(path), resolved, free)
    write_json(path, resolved)


def refuse_changed(
    out: Path, run: str, old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str] = ()
) -> None:
    """Raises `DataError` naming the keys whose values differ, except those of `free`."""
    if changed := [key for key in changed_keys(old, new) if key not in free]:
        raise DataError(
            f"{out} holds {run} with other inputs (changed: {', '.join(changed)}); restore them or name a new output"
        )


def read_inputs(path: Path) -> dict[str, Any]:
    """The inputs in a file that `check_inputs` wrote. Raises `DataError` if it cannot be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read; restore it, or name a new output") from error
    return content


def changed_keys(old: Any, new: Any, place: str = "") -> list[str]:
    """Dotted names of the keys whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            name
            for key in sorted({*old, *new})
            for name in changed_keys(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        ]
    return [] if old == new else [place]
