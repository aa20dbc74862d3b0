"""Refuses local names that say nothing, and two public classes of one name: `python tools/check_names.py [PATH ...]`,
part of `make check`.

A name of `BANNED` may stand in a comprehension of one line; elsewhere a variable, a parameter or a loop's target is
called after what it holds.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

BANNED = frozenset(
    {"found", "one", "own", "made", "told", "given", "left", "held", "here", "there", "ours", "what", "who"}
)
ROOTS = ("src", "tests", "benchmarks", "examples", "tools")

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)


def banned_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the name of each variable or parameter that may not be called so."""
    allowed = {
        id(node)
        for comprehension in ast.walk(tree)
        if isinstance(comprehension, _COMPREHENSIONS) and comprehension.lineno == comprehension.end_lineno
        for node in ast.walk(comprehension)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        else:
            continue
        if name in BANNED and id(node) not in allowed:
            yield node.lineno, name


def same_classes(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """A line for each public class of the package whose name another module's class has too."""
    places: dict[str, list[str]] = {}
    for path, tree in trees.items():
        if path.is_relative_to("src"):
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(f"{path}:{node.lineno}")
    for name, lines in places.items():
        if len(lines) > 1:
            yield f"{', '.join(lines)}: classes of one name, {name}; name each after what it alone is"


def main(arguments: list[str]) -> int:
    """Print each such name with its place; the exit code is 1 if there is any."""
    roots = [Path(argument) for argument in arguments or ROOTS]
    files = sorted(path for root in roots for path in ([root] if root.is_file() else root.rglob("*.py")))
    trees = {path: ast.parse(path.read_text("utf-8"), str(path)) for path in files}
    faults = [
        f"{path}:{line}: {name!r} says nothing; name what it holds"
        for path, tree in trees.items()
        for line, name in banned_names(tree)
    ]
    faults += same_classes(trees)
    print(*faults, sep="\n", end="\n" if faults else "")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
