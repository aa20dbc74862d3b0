"""Error messages for settings that pydantic refuses; an unknown key gets its new name, or the closest known key.

A settings model lists its renamed keys in `renamed_keys: ClassVar[dict[str, str]]`, old name to new name.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic_core import ErrorDetails


def first_problem(problems: Sequence[ErrorDetails], root: type[BaseModel], whole: str) -> str:
    """The first problem of settings of type `root`: the key and what is wrong, never the value.

    An unknown key comes before other problems: it may be a missing key, misspelt. `whole` names the settings.
    """
    problem = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{place}: {message}" if place else message
    if problem["type"] != "extra_forbidden":
        return f"{place or whole} {_problem_text(problem)}"
    if renamed := renamed_key(root, problem["loc"]):
        return f"{place!r} was renamed: write {renamed!r}"
    close = nearest_key(root, problem["loc"])
    hint = f"; did you mean {close!r}?" if close else "; remove it"
    return f"unknown key {place!r}{hint}"


def _problem_text(problem: ErrorDetails) -> str:
    """Pydantic's message as the end of a sentence that begins with the key."""
    if problem["type"] == "missing":
        return "is missing: give it"
    if problem["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return "should be a mapping of keys to values"
    return problem["msg"].replace("Input should", "should", 1).replace("a valid tuple", "a list")


def renamed_key(root: type[BaseModel], place: Sequence[str | int]) -> str | None:
    """The full new name of a key that was renamed within its section; None for any other key."""
    for section in _resolve(root, place[:-1])[1]:
        renamed: Mapping[str, str] = getattr(section, "renamed_keys", {})
        if new_name := renamed.get(str(place[-1])):
            return ".".join([*map(str, place[:-1]), new_name])
    return None


def nearest_key(root: type[BaseModel], place: Sequence[str | int]) -> str | None:
    """The known key closest to the unknown one: misplaced, misspelt, or both; with its full name if elsewhere."""
    known = known_keys(root)
    unknown, section = str(place[-1]), ".".join(_resolve(root, place[:-1])[0])
    siblings = {name: name for name, parent in known if parent == section}
    elsewhere = {name: f"{parent}.{name}" if parent else name for name, parent in known if parent != section}
    for names, likeness in ((elsewhere, 1.0), (siblings, 0.6), (elsewhere, 0.6)):
        close = difflib.get_close_matches(unknown, names, n=1, cutoff=likeness)
        if close:
            return names[close[0]]
    return None


def known_keys(root: type[BaseModel], place: str = "") -> list[tuple[str, str]]:
    """Every key with the dotted name of its section, outer sections last."""
    keys: list[tuple[str, str]] = []
    for name, field in root.model_fields.items():
        for section in _sections(field.annotation):
            keys += known_keys(section, f"{place}.{name}" if place else name)
    return keys + [(name, place) for name in root.model_fields]


def _resolve(root: type[BaseModel], place: Sequence[str | int]) -> tuple[list[str], list[type[BaseModel]]]:
    """The names of the sections on the way to a place, without list indices and mapping keys, and the models there."""
    names: list[str] = []
    sections = [root]
    for part in place:
        name = str(part)
        field = next((section.model_fields[name] for section in sections if name in section.model_fields), None)
        if field is not None:
            names.append(name)
            sections = _sections(field.annotation)
    return names, sections


def _sections(annotation: Any) -> list[type[BaseModel]]:
    inner = getattr(annotation, "__args__", ())
    if isinstance(annotation, type) and not inner:
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [section for part in inner for section in _sections(part)]
