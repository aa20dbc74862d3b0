"""An evaluation's report on the disk: `report.md`, `report.html` and the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.errors import MissingExtraError
from guardreasoner_vl.evaluation.report import markdown, page
from guardreasoner_vl.storage.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from guardreasoner_vl.evaluation.predictions import Prediction
    from guardreasoner_vl.evaluation.results import Results


def write_report(results: Results, rows: Sequence[Prediction], out: Path, command: str) -> str | None:
    """Write it; why there are no figures, if there are none."""
    figures: dict[str, str] = {}
    lacking = None
    try:
        from guardreasoner_vl.evaluation.figures import draw

        figures = draw(results, rows)
    except MissingExtraError as error:
        lacking = f"no figures: {error}"
    names = []
    for name, svg in figures.items():
        names.append(f"{name}.svg")
        write_text(out / names[-1], svg)
    write_text(out / "report.md", markdown(results, command, names))
    write_text(out / "report.html", page(results, command, figures))
    return lacking
