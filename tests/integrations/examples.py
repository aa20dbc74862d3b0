"""The examples as modules, which no package holds."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "examples" / "integrations"


def example(name: str) -> dict[str, Any]:
    """What an example defines; its `main` is not run."""
    return runpy.run_path(str(FOLDER / name))
