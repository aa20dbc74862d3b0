"""Types of settings in words: what somebody who writes YAML or JSON has to write."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", SecretStr: "secret"}
_PLURALS = {
    "text": "texts",
    "integer": "integers",
    "number": "numbers",
    "path": "paths",
    "section": "sections",
    "object": "objects",
}
_SIGNS = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))


def type_text(annotation: Any, metadata: Iterable[object] = ()) -> str:
    """The type with its bounds, such as `number (> 0, <= 1) or null`."""
    return any_of(_choices(annotation, tuple(metadata)))


def any_of(words: Sequence[str]) -> str:
    """Words as a choice: a, b or c."""
    if not words:
        return ""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def plural(words: str) -> str:
    """A type's name as what a list holds."""
    return _PLURALS.get(words.partition(" (")[0], words) + "".join(words.partition(" (")[1:])


def sections(annotation: Any) -> list[tuple[type[BaseModel], str]]:
    """The sections in a type, each with what stands after the key's name: `[]` for a list, `.NAME` for a mapping."""
    parts = get_args(annotation)
    if not parts:
        return [(annotation, "")] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    after = {tuple: "[]", list: "[]", dict: ".NAME"}.get(get_origin(annotation), "")
    return [(section, after + rest) for part in parts for section, rest in sections(part)]


def _choices(annotation: Any, metadata: Sequence[object]) -> list[str]:
    """What the type allows, null last."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _choices(parts[0], _bounds(parts[1:]))
    if origin in (Union, UnionType):
        kinds = [kind for part in parts if part is not NoneType for kind in _choices(part, metadata)]
        return [*kinds, *(["null"] if NoneType in parts else [])]
    if origin is Literal:
        return [f"`{part}`" for part in parts]
    if origin in (tuple, list):
        item = type_text(parts[0])
        fixed = len(parts) if origin is tuple and parts[-1] is not Ellipsis else 0
        if fixed:
            return [f"list of {fixed}, each {item}" if " or " in item else f"list of {fixed} {plural(item)}"]
        return [f"list of {plural(item)}"]
    if origin is dict:
        return [f"mapping of {type_text(parts[0])} to {type_text(parts[1])}"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["section"]
    limits = ", ".join(_limits(metadata))
    return [_NAMES.get(annotation, "any value") + (f" ({limits})" if limits else "")]


def _bounds(metadata: Iterable[object]) -> list[object]:
    return [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _limits(metadata: Iterable[object]) -> list[str]:
    return [
        f"{sign} {getattr(item, name):,}" for item in metadata for kind, name, sign in _SIGNS if isinstance(item, kind)
    ]
