"""Loads the example scripts, which belong to no package, as modules."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "examples" / "integrations"


def example(name: str) -> dict[str, Any]:
    """The names that an example defines; its `main` is not run."""
    return runpy.run_path(str(FOLDER / name))
