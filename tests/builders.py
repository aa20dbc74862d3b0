"""What tests of several rooms build: rows, answers, predictions, and files of rows."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from typing import TYPE_CHECKING, Any

from PIL import Image

from guardreasoner_vl.evaluation.predictions import Prediction
from guardreasoner_vl.types import Judgement, Label, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def sample(name: str, **fields: Any) -> Sample:
    """A text row of the source `toy`, without labels."""
    return Sample.model_validate({"id": name, "source": "toy", "modality": "text", "prompt": "bread?", **fields})


def answer(request: str = "unharmful", response: str = "None", reasoning: str = "It is about bread.") -> str:
    """A guard's answer in the protocol's form."""
    return f"<think>\n{reasoning}\n</think>\n<result>\nAnswers:\nRequest: {request}\nResponse: {response}\n</result>"


def prediction(name: str, truth: str | None, label: str, score: float | None = None, **fields: Any) -> Prediction:
    """A guard's judgement of a request, beside its label."""
    not_asked = Judgement(label=Label.NOT_APPLICABLE)
    row = {"benchmark": "toy", "modality": "text", "mode": "fast", "response": not_asked, "request_truth": truth}
    judged = Judgement(label=Label(label), score=score)
    return Prediction.model_validate({"id": name, "request": judged, **row, **fields})


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as JSON lines; a row without source and modality is a text of the source `toy`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"source": "toy", "modality": "text", **row}) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_records(folder: Path, name: str, content: Any) -> Path:
    """Write records in the format that the ending of the name says: CSV, Parquet, JSON or JSON lines, packed or not."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
        return path
    if name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(content), path)
        return path
    lines = ".jsonl" in name
    text = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content)
    packers: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress}
    path.write_bytes(packers.get(path.suffix, bytes)(text.encode()))
    return path


def write_image(folder: Path, name: str) -> None:
    """Write a small red image."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (28, 28), "red").save(path)


def labels(samples: Sequence[Sample]) -> list[tuple[str | None, str | None]]:
    """The labels of request and response of each row."""
    return [(row.request_label, row.response_label) for row in samples]
