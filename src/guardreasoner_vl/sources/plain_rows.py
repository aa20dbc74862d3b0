"""Turn a file of labelled rows as people keep them, `{"prompt": ..., "label": ...}`, into a source folder.

The other fields of `sources.jsonl` are derived: the id from the content, so that a row keeps its split when the file is
sorted anew or grows; the modality from what is there; image paths relative to the new folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.sources.jsonl import row_sample
from guardreasoner_vl.sources.records import NotASampleError, read_records
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.storage.atomic import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from guardreasoner_vl.types import GoldLabel

TRAIN = "train.jsonl"
_FIELDS = ("prompt", "response", "image", "images", "label", "request_label", "response_label", "id", "reasoning")
_LABELS: dict[str, GoldLabel] = {
    **dict.fromkeys(("harmful", "unsafe", "1", "true"), "harmful"),
    **dict.fromkeys(("unharmful", "safe", "harmless", "benign", "0", "false"), "unharmful"),
}


@dataclass
class ImportReport:
    """Rows written, by the labels of (request, response), and rows skipped by reason."""

    labels: dict[tuple[GoldLabel | None, GoldLabel | None], int] = field(default_factory=dict)
    skipped: SkippedRows = field(default_factory=SkippedRows)

    @property
    def rows(self) -> int:
        """Number of rows written."""
        return sum(self.labels.values())


def import_rows(path: Path, out: Path, source: str) -> ImportReport:
    """Write `out/train.jsonl` of the JSON, JSON lines, CSV or Parquet file at `path`; `source` names the rows.

    Fields of a row: `prompt`, `response`, `image` or `images` (paths from the file's folder), `label` or
    `request_label`, `response_label`, `id`, `reasoning`. A row that cannot be used is skipped with its reason. Raises
    `DataError` for a file that cannot be read, a folder that is not new, and where no row can be used.
    """
    if out.exists():
        raise DataError(f"{out} exists: give the name of a new folder")
    report = ImportReport()
    lines: dict[str, bytes] = {}
    for row in read_records(path):
        try:
            record = _sample_record(row.record, path.parent, out, source)
            if record["id"] in lines:
                raise NotASampleError("repeated id or content")
            sample = row_sample(record, out)
            lines[sample.id] = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            labels = sample.request_label, sample.response_label
            report.labels[labels] = report.labels.get(labels, 0) + 1
        except NotASampleError as error:
            report.skipped.add(str(error), row.place)
    if not lines:
        reasons = "; ".join(f"{reason} ({count:,} rows)" for reason, count in report.skipped.reasons.items())
        raise DataError(
            f"{path}: no row can be used ({reasons or 'the file is empty'}); give rows with content and a label"
        )
    out.mkdir(parents=True)
    write_whole(out / TRAIN, lines.values())
    return report


def _sample_record(record: Mapping[str, Any], folder: Path, out: Path, source: str) -> dict[str, Any]:
    """The fields of a sample. Raises `NotASampleError`."""
    if unknown := sorted(record.keys() - set(_FIELDS)):
        raise NotASampleError(f"unknown field {unknown[0]!a:.40}: use {', '.join(_FIELDS)}")
    texts = {name: _text_of_field(record, name) for name in ("prompt", "response", "reasoning")}
    images = [os.path.relpath(folder / name, out) for name in _image_paths(record)]
    if not (texts["prompt"] or images or texts["response"]):
        raise NotASampleError("no prompt, image or response")
    labels = {name: _label_field(record, name) for name in ("request_label", "response_label")}
    if record.get("label") is not None:
        if texts["response"] or labels["request_label"]:
            raise NotASampleError("label: say request_label or response_label, since there are two to be labelled")
        labels["request_label"] = _label_field(record, "label")
    if not any(labels.values()):
        raise NotASampleError("no label: give label, request_label or response_label")
    if labels["response_label"] and not texts["response"]:
        raise NotASampleError("response_label: there is no response")
    return {
        "id": _row_id(record, texts, images, source),
        "source": source,
        "modality": ("text-image" if texts["prompt"] else "image") if images else "text",
        "images": images,
        **texts,
        "prompt": texts["prompt"] or "",
        **labels,
    }


def _text_of_field(record: Mapping[str, Any], name: str) -> str | None:
    text = record.get(name)
    if text is not None and not isinstance(text, str):
        raise NotASampleError(f"{name}: not a text")
    return text if text and text.strip() else None


def _image_paths(record: Mapping[str, Any]) -> list[str]:
    names = record.get("images") if record.get("images") is not None else record.get("image")
    names = [names] if isinstance(names, str) and names else names or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise NotASampleError("images: not a path or a list of paths")
    return names


def _label_field(record: Mapping[str, Any], name: str) -> GoldLabel | None:
    word = record.get(name)
    if word is None or word == "":
        return None
    label = _LABELS.get(str(word).strip().lower())
    if label is None:
        raise NotASampleError(f"{name}: not one of {', '.join(_LABELS)}")
    return label


def _row_id(record: Mapping[str, Any], texts: Mapping[str, str | None], images: list[str], source: str) -> str:
    if record.get("id") not in (None, ""):
        return str(record["id"])
    content = json.dumps([texts["prompt"], texts["response"], images], ensure_ascii=False)
    return f"{source}/{hashlib.sha256(content.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
