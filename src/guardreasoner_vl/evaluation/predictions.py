"""A guard's predictions on labelled rows: one JSON line per row, with its true labels.

An evaluation's folder holds the predictions, the settings they share, and the figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from guardreasoner_vl.sources.content import content_digest
from guardreasoner_vl.storage.jsonl_log import Format, read_log_rows
from guardreasoner_vl.types import Frozen, GoldLabel, Judgement, Modality, Mode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guardreasoner_vl.types import Sample, Verdict


PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"
SETTINGS = "evaluation.json"


class Prediction(Frozen):
    """One row's true labels (null: not labelled) and judgements; `content` is stored only on request."""

    id: str
    benchmark: str
    modality: Modality
    category: str | None = None
    request_truth: GoldLabel | None = None
    response_truth: GoldLabel | None = None
    request: Judgement
    response: Judgement
    error: str | None = None
    mode: Mode
    digest: str | None = None
    """Digest of the judged content, so that a later change of the row is detected."""
    completion_tokens: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0)
    content: dict[str, Any] | None = None

    @classmethod
    def of(cls, sample: Sample, benchmark: str, verdict: Verdict, with_content: bool) -> Prediction:
        """The prediction of one judged row."""
        return cls(
            id=sample.id,
            benchmark=benchmark,
            modality=sample.modality,
            category=sample.provenance.category,
            request_truth=sample.request_label,
            response_truth=sample.response_label,
            request=verdict.request,
            response=verdict.response,
            error=verdict.error.code if verdict.error else None,
            mode=verdict.mode,
            digest=row_digest(sample),
            completion_tokens=verdict.usage.completion_tokens,
            seconds=verdict.usage.seconds,
            content=_stored_content(sample, verdict) if with_content else None,
        )


def row_digest(sample: Sample) -> str:
    """The digest of a row's content that its prediction stores: 16 hexadecimal digits."""
    return content_digest((sample,))[:16]


def _stored_content(sample: Sample, verdict: Verdict) -> dict[str, Any]:
    return {
        "prompt": sample.prompt,
        "images": list(sample.images),
        "response": sample.response,
        "reasoning": verdict.reasoning,
    }


def read_predictions(path: Path) -> Iterator[Prediction]:
    """Stream the predictions of one file. Raises `DataError` with the line that is invalid or repeats a row."""
    return read_log_rows(path, FORMAT)


FORMAT = Format(
    Prediction.model_validate_json,
    "a prediction",
    "give a predictions.jsonl that evaluate wrote",
    key=lambda row: (row.benchmark, row.id),
)
"""The format of a predictions file."""
