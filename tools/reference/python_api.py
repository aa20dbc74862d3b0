"""The page of the public Python API: signatures and docstrings of `guardreasoner_vl.__all__`."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

import guardreasoner_vl
from guardreasoner_vl.errors import GuardError
from tools.reference.markdown import anchor, code, docstring, page, table
from tools.reference.types import any_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_INTRO = "Importing the package loads no torch; a name is loaded when it is first used."
_WIDTH = 100
_HOMES = (
    "choices",
    "types.exchange",
    "types.image",
    "types.sample",
    "types.verdict",
    "judging.calibration",
    "judging.policy",
    "engines.base",
    "engines.label_scores",
    "engines.scripted",
    "guard",
)
"""Modules whose types the public signatures name."""

_NAME = re.compile(r"\b[A-Z]\w+")
_STARS: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_ATTRIBUTES = re.compile(r"\n*^Attributes:\n((?:    .*\n?)+)", re.MULTILINE)
_ATTRIBUTE = re.compile(r"^    (\w+): ((?:.*)(?:\n        .*)*)", re.MULTILINE)


def python_page() -> str:
    """All public names: classes first, then the exceptions by name."""
    members = {name: getattr(guardreasoner_vl, name) for name in sorted(guardreasoner_vl.__all__)}
    exceptions = [name for name, member in members.items() if issubclass(member, GuardError)]
    classes = {name: member for name, member in members.items() if name not in exceptions}
    index = [(f"[`{name}`](#{anchor(name)})", _first(member)) for name, member in classes.items()]
    blocks = [block for name, member in classes.items() for block in _class(name, member)]
    return page(
        "Python API",
        _INTRO,
        table(("name", "purpose"), index),
        f"Exceptions: {', '.join(map(code, exceptions))}; see [error-codes.md](error-codes.md).",
        *blocks,
        "## Types in signatures",
        "They are not part of the public names; import them from the module given, where you need them at all.",
        *_types(blocks, set(members)),
    )


def _types(blocks: list[str], known: set[str]) -> Iterator[str]:
    """The package's own types that signatures and fields name, and those that these name in turn."""
    kinds: dict[str, tuple[str, Any]] = {}
    waiting = list(blocks)
    while waiting:
        for name in sorted(_named(waiting.pop()) - known - set(kinds)):
            if home := _home(name):
                kinds[name] = home, getattr(import_module(home), name)
                waiting += _type(name, *kinds[name])
    for name in sorted(kinds):
        yield from _type(name, *kinds[name])


def _named(block: str) -> set[str]:
    """The names of types in a block of code, or in the second column of a table."""
    if block.startswith("```"):
        return set(_NAME.findall(block))
    rows = [line.split(" | ") for line in block.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in _NAME.findall(row[1])}


def _home(name: str) -> str | None:
    """The module of the package that defines the type; None for one of another package, and for a type variable."""
    for home in _HOMES:
        module = import_module(f"{guardreasoner_vl.__name__}.{home}")
        kind = getattr(module, name, None)
        if _alias(module.__name__, name) or (isinstance(kind, type) and kind.__module__ == module.__name__):
            return module.__name__
    return None


def _type(name: str, home: str, kind: Any) -> list[str]:
    title = f"### {name}"
    if alias := _alias(home, name):
        value, meaning = alias
        return [title, f"```python\n{name} = {value}  # {home}\n```", meaning]
    if issubclass(kind, BaseModel):
        fields = table(("field", "type", "default", "meaning"), list(_fields(kind)))
        return [title, f"```python\nfrom {home} import {name}\n```", _text(kind), fields]
    listed = table(("attribute", "meaning"), [(code(key), text) for key, text in attributes(kind).items()])
    block = _block(name, inspect.signature(kind), _factories(kind))
    call = [block] if dataclasses.is_dataclass(kind) else []
    return [title, f"```python\nfrom {home} import {name}\n```", *call, _text(kind), listed]


def _alias(home: str, name: str) -> tuple[str, str] | None:
    """The right side of `name = ...` in the module, if it is an alias of types, and the docstring after it."""
    body = ast.parse(inspect.getsource(import_module(home))).body
    for statement, after in zip(body, [*body[1:], None], strict=True):
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=target)], value=value)
                | ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value)
            ) if target == name and not isinstance(value, ast.Call):
                text = value.value if isinstance(value, ast.Constant) else ast.unparse(value).replace("'", '"')
                meaning = after.value if isinstance(after, ast.Expr) else None
                return str(text), str(meaning.value) if isinstance(meaning, ast.Constant) else ""
    return None


def attributes(kind: type[Any]) -> dict[str, str]:
    """What the list `Attributes:` of a docstring says about each attribute."""
    listed = _ATTRIBUTES.search(docstring(kind))
    return {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(listed[1])} if listed else {}


def _class(name: str, kind: type[Any]) -> Iterator[str]:
    yield f"## {name}"
    if issubclass(kind, enum.Enum):
        yield _text(kind)
        yield table(("member", "value"), [(code(f"{name}.{member.name}"), code(member.value)) for member in kind])
        return
    if issubclass(kind, BaseModel):
        yield _text(kind)
        yield table(("field", "type", "default", "meaning"), list(_fields(kind)))
    else:
        yield _block(name, inspect.signature(kind), _factories(kind))
        yield _text(kind)
        yield table(("attribute", "meaning"), [(code(key), text) for key, text in attributes(kind).items()])
    for method, function in _members(kind):
        yield from _member(f"{name}.{method}", function)


def _member(name: str, member: Any) -> Iterator[str]:
    if isinstance(member, property):
        returns = inspect.signature(member.fget).return_annotation if member.fget else ""
        yield f"### {name}"
        yield f"```python\n{name}: {_annotation(returns)}\n```"
    else:
        function = getattr(member, "__func__", member)
        word = "async " if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function) else ""
        signature = inspect.signature(function)
        bound = not isinstance(member, staticmethod)
        yield f"### {name}"
        yield _block(word + name, signature.replace(parameters=list(signature.parameters.values())[bound:]), {})
    yield _text(member)


def _members(kind: type[Any]) -> list[tuple[str, Any]]:
    """Public methods and properties of the class and of its bases in this package, in the order of their lines."""
    bases = [base for base in reversed(kind.__mro__) if base.__module__.partition(".")[0] == guardreasoner_vl.__name__]
    members = {name: member for base in bases for name, member in vars(base).items() if not name.startswith("_")}
    types = (property, classmethod, staticmethod)
    return [
        (name, member) for name, member in members.items() if inspect.isfunction(member) or isinstance(member, types)
    ]


def _fields(kind: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    annotations = {
        name: text for base in reversed(kind.__mro__) for name, text in inspect.get_annotations(base).items()
    }
    listed = attributes(kind)
    for name, field in kind.model_fields.items():
        default = "required" if field.is_required() else code(_value(field.get_default(call_default_factory=True)))
        yield code(name), _choices(_annotation(annotations[name])), default, field.description or listed.get(name, "")


def _factories(kind: type[Any]) -> dict[str, str]:
    """How the defaults of a dataclass are made that a factory makes."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return {
        field.name: f"{getattr(field.default_factory, '__name__', 'factory')}()"
        for field in fields
        if field.default_factory is not dataclasses.MISSING
    }


def _block(name: str, signature: inspect.Signature, factories: dict[str, str]) -> str:
    """The call as Python, one parameter a line where it does not fit into one."""
    parameters = list(_parameters(signature, factories))
    result = (
        f" -> {_annotation(signature.return_annotation)}"
        if signature.return_annotation not in (inspect.Signature.empty, None, "None")
        else ""
    )
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) > _WIDTH:
        line = "\n".join([f"{name}(", *(f"    {parameter}," for parameter in parameters), f"){result}"])
    return f"```python\n{line}\n```"


def _parameters(signature: inspect.Signature, factories: dict[str, str]) -> Iterator[str]:
    marked = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not marked:
            yield "*"
        marked |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = _STARS.get(parameter.kind, "")
        typed = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
        value = "" if parameter.default is parameter.empty else factories.get(parameter.name, _value(parameter.default))
        equals = (" = " if typed else "=") if value else ""
        yield f"{stars}{parameter.name}{typed}{equals}{value}"


def _value(value: object) -> str:
    """A default as Python; one whose text would hold an address is left open."""
    if isinstance(value, BaseModel) and value == type(value)():
        return f"{type(value).__name__}()"
    if isinstance(value, frozenset):
        return f"frozenset({{{', '.join(sorted(map(repr, value)))}}})"
    text = repr(value)
    return "..." if " at 0x" in text else text


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _choices(annotation: str) -> str:
    """A type for a table: its alternatives apart, since not every reader of Markdown takes a `|` in a cell."""
    parts, depth = [""], 0
    for character in annotation:
        depth += (character in "[(") - (character in "])")
        if character == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return any_of([code(part.strip()) for part in parts])


def _text(thing: Any) -> str:
    """The docstring without its list of attributes, which is shown as a table."""
    return _ATTRIBUTES.sub("", docstring(thing)).strip()


def _first(thing: Any) -> str:
    return _text(thing).split("\n\n")[0]
