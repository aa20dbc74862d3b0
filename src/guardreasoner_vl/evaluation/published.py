"""The paper's figures (Tables 1 to 3) and the sizes of its benchmarks, as package data."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guardreasoner_vl.types import Modality

Task = Literal["prompt", "response"]
AVERAGES = {"Average (Text)": ("text",), "Average (All)": ("text", "image", "text-image")}


@dataclass(frozen=True)
class Size:
    """One benchmark of the paper: its file's name in the released test set, number of samples and modality."""

    task: Task
    benchmark: str
    file: str
    samples: int
    modality: Modality


@cache
def sizes() -> tuple[Size, ...]:
    """The 14 benchmarks, in the tables' order."""
    return tuple(
        Size(row["task"], row["benchmark"], row["file"], int(row["samples"]), row["modality"])  # type: ignore[arg-type]
        for row in _table_rows("sizes.csv")
    )


@cache
def published_f1(task: Task) -> dict[str, dict[str, float | None]]:
    """F1 in percent by model and benchmark, with averages; None if the paper gives none."""
    table: dict[str, dict[str, float | None]] = {}
    for row in _table_rows("f1.csv"):
        if row["task"] == task:
            table.setdefault(row["model"], {})[row["benchmark"]] = float(row["f1"]) if row["f1"] else None
    return table


@cache
def published_tokens() -> dict[str, float]:
    """Mean output tokens over all benchmarks by model, for the models in Table 3."""
    return {row["model"]: float(row["tokens"]) for row in _table_rows("tokens.csv")}


def averages(task: Task, f1: Mapping[str, float | None]) -> dict[str, float | None]:
    """The paper's sample-weighted averages; None if a benchmark of the average is missing."""
    result: dict[str, float | None] = {}
    for name, modalities in AVERAGES.items():
        parts = [size for size in sizes() if size.task == task and size.modality in modalities]
        values = [(f1.get(size.benchmark), size.samples) for size in parts]
        known = [(value, weight) for value, weight in values if value is not None]
        complete = len(known) == len(values)
        result[name] = sum(v * w for v, w in known) / sum(w for _, w in known) if complete else None
    return result


def _table_rows(name: str) -> list[dict[str, str]]:
    text = files("guardreasoner_vl.evaluation").joinpath("published", name).read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))
