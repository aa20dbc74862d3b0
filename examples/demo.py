"""Moderate the exchanges of `demo.jsonl`: text, images, and both, with the guard that ships in the package.

    make demo

The same file works on the command line: guardreasoner-vl batch examples/demo.jsonl verdicts.jsonl
"""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from guardreasoner_vl import Guard

HERE = Path(__file__).parent


def main() -> None:
    """Judge the rows and show each verdict with its reasoning."""
    console = Console()
    rows = [json.loads(line) for line in (HERE / "demo.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        row["images"] = [str(HERE / name) for name in row.get("images", ())]
    with Guard.load("embedded") as guard:
        console.print(f"guard: {guard.model.name} {guard.model.revision}\n")
        for row, verdict in zip(rows, guard.moderate_batch(rows), strict=True):
            text = Text()
            for name in ("prompt", "response"):
                if row.get(name):
                    text.append(f"{name:9}", style="bold").append(f"{row[name]}\n")
            for name in row["images"]:
                text.append("image  ", style="bold").append(f"{Path(name).relative_to(HERE)}\n")
            text.append(f"\n{verdict.reasoning or verdict.error}\n\n", style="dim")
            text.append(f"request {verdict.request.label}, response {verdict.response.label} -> ")
            text.append(verdict.action, style="bold red" if verdict.action == "block" else "bold green")
            text.append(f"   ({verdict.usage.completion_tokens} tokens)", style="dim")
            console.print(Panel(text, title=row["id"], title_align="left"))


if __name__ == "__main__":
    main()
