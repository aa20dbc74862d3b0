"""Write the reference: `python -m tools.reference`, or `make reference`.

`--check` writes nothing: it names each page that is missing or stale, and the exit code is 1 if there is any.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tools.reference.pages import pages

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"


def stale(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """Names of the pages in `folder` that differ from the `wanted` ones or are not among them."""
    existing = {path.name: path.read_text("utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in wanted.keys() | existing.keys() if wanted.get(name) != existing.get(name))


def main(arguments: list[str]) -> int:
    """Write or check all pages."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m tools.reference [--check]\n")
        return 2
    wanted = pages()
    names = stale(FOLDER, wanted)
    for name in names:
        sys.stdout.write(
            f"{FOLDER.name}/{name}: stale; run `make reference`\n" if arguments else f"{FOLDER.name}/{name}\n"
        )
    if arguments:
        return int(bool(names))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in wanted:
            (FOLDER / name).write_text(wanted[name], "utf-8")
        else:
            (FOLDER / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
