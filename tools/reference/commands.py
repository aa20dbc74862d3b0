"""The page of the command line: every command, its arguments and options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import typer.main

from guardreasoner_vl.cli.app import app
from tools.reference.markdown import anchor, code, page, table
from tools.reference.types import any_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = "guardreasoner-vl"
_INTRO = """\
Every command prints this help with `--help`. A failure is one line on stderr with exit code 2, and no traceback. An
option that would have no effect beside the others is refused."""
_HEAD = ("option", "value", "default", "meaning")
_VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def commands_page() -> str:
    """All commands, in the order of `--help`."""
    root: Any = typer.main.get_command(app)
    commands = list(_commands(root, PROGRAM))
    index = [(f"[`{name}`](#{anchor(name)})", _paragraphs(command)[0]) for name, command in commands]
    options = table(_HEAD, [_option(parameter) for parameter in root.params])
    sections = [block for name, command in commands for block in _section(name, command)]
    return page(
        "Command line", "\n\n".join(_paragraphs(root)), _INTRO, options, table(("command", "purpose"), index), *sections
    )


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Full name and command, those of sub-groups included."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _section(name: str, command: Any) -> Iterator[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter not in arguments and not parameter.hidden]
    yield f"## {name}"
    yield from _paragraphs(command)
    needed = [f"{option.opts[0]} {_value(option)}" for option in options if option.required]
    words = [name, *map(_value, arguments), *needed, *(["[OPTIONS]"] if len(needed) < len(options) else [])]
    yield "```\n" + " ".join(words) + "\n```"
    yield table(("argument", "meaning"), [(code(_value(argument)), argument.help or "") for argument in arguments])
    yield table(_HEAD, map(_option, options))


def _option(option: Any) -> tuple[str, str, str, str]:
    names = ", ".join(map(code, [*option.opts, *option.secondary_opts]))
    default = (
        "required" if option.required else "" if option.default in (None, False, ()) else code(str(option.default))
    )
    value = any_of([code(word) for word in _values(option)])
    return names, value, default, " ".join([option.help or "", *_limits(option)])


def _values(parameter: Any) -> list[str]:
    """What stands after the option's name: its choices, else its metavar or a word for its type."""
    if getattr(parameter, "is_flag", False):
        return []
    kind = parameter.type_descriptor.annotation
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return str(parameter.metavar or _VALUES.get(kind, "VALUE")).split("|")


def _value(parameter: Any) -> str:
    return "|".join(_values(parameter))


def _limits(option: Any) -> list[str]:
    """The bounds of a number, as a sentence."""
    least, most = getattr(option, "min", None), getattr(option, "max", None)
    if least is not None and most is not None:
        return [f"From {least:g} to {most:g}."]
    return [f"{word} {value:g}." for word, value in (("At least", least), ("At most", most)) if value is not None]


def _paragraphs(command: Any) -> list[str]:
    """The help, its paragraphs unwrapped."""
    return [" ".join(part.split()) for part in (command.help or "").split("\n\n") if part.strip()]
