"""The pages of settings: each key of a pydantic model and of the sections below it."""

from __future__ import annotations

import inspect
import json
import re
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from guardreasoner_vl.recipe import Recipe
from guardreasoner_vl.service.config import PREFIX, ServiceConfig
from tools.reference.markdown import anchor, code, docstring, page, table
from tools.reference.types import sections, type_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

_HEAD = ("key", "type", "default", "meaning")
_RECIPES = """\
A recipe is a YAML file; `recipes/` has examples. Keys that are left out have their defaults, unknown keys are refused
with the nearest known one. `extends: OTHER.yaml` inherits from a recipe in the same folder: mappings are merged key by
key, any other value replaces the inherited one. "Paper" is GuardReasoner-VL (arXiv 2505.11049)."""
_SERVICE = f"""\
`guardreasoner-vl serve --config FILE` reads these settings from YAML. A variable of the environment overrides the file:
`{PREFIX}` and the key's name in capitals, with two underscores for each dot, as in `{PREFIX}LIMITS__QUEUE=64`;
lists and mappings are JSON, and `keys`, `allowed_hosts` and `allowed_origins` may be separated by commas. Options of
the command override both. Unknown keys are refused with the nearest known one. `serve --print-config` prints the
resolved settings, secrets masked."""


def recipes_page() -> str:
    """Every key of a recipe, by section."""
    return page("Recipe keys", _RECIPES, *_sections(Recipe))


def service_page() -> str:
    """Every setting of the service, by section."""
    return page("Service settings", _SERVICE, *_sections(ServiceConfig))


def places(root: type[BaseModel]) -> dict[type[BaseModel], list[str]]:
    """The sections below `root` in the order of their keys, each with the keys under which it stands."""
    result: dict[type[BaseModel], list[str]] = {}
    for section, place in _walk(root, ""):
        result.setdefault(section, []).append(place)
    return result


def _walk(model: type[BaseModel], place: str) -> Iterator[tuple[type[BaseModel], str]]:
    yield model, place
    for name, field in model.model_fields.items():
        for section, after in sections(field.annotation):
            yield from _walk(section, f"{place}.{name}{after}" if place else f"{name}{after}")


def _sections(root: type[BaseModel]) -> Iterator[str]:
    headings = {
        section: ", ".join(map(code, keys)) if keys[0] else "Top level" for section, keys in places(root).items()
    }
    for section, heading in headings.items():
        yield f"## {heading}"
        if section is not root:
            yield docstring(section)
        yield table(_HEAD, [_row(name, field, headings) for name, field in _fields(section)])


def _fields(section: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """The keys of a section, inherited ones last."""
    return sorted(section.model_fields.items(), key=lambda item: item[0] not in inspect.get_annotations(section))


def _row(name: str, field: FieldInfo, headings: dict[type[BaseModel], str]) -> tuple[str, str, str, str]:
    kind = type_text(field.annotation, field.metadata)
    below = sections(field.annotation)
    if below:
        kind = re.sub(r"(sections?)", rf"[\1](#{anchor(headings[below[0][0]])})", kind)
    return code(name), kind, _default(field, bool(below)), field.description or ""


def _default(field: FieldInfo, has_sections: bool) -> str:
    if field.is_required():
        return "required"
    value: Any = to_jsonable_python(field.get_default(call_default_factory=True))
    return "its defaults" if has_sections and value else code(json.dumps(value))
