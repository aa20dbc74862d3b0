"""Checks that every reader makes of a sample, whatever the file's format, and the reasons for refusing a row.

Reasons name fields and never quote their values.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from guardreasoner_vl.images.encoded import file_name_fault
from guardreasoner_vl.sources.records import NOT_UTF8, NotASampleError
from guardreasoner_vl.types import Sample
from guardreasoner_vl.types.media import leading_marks

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXTS = ("id", "source", "split", "prompt", "response", "reasoning")
_SHOWN = 60


def made_from(fields: Mapping[str, Any]) -> Sample:
    """The sample with these fields. Raises `NotASampleError` that names the first field that is wrong."""
    try:
        sample = Sample.model_validate(fields)
    except ValidationError as error:
        raise NotASampleError(field_fault(error)) from error
    return checked(sample)


def field_fault(error: ValidationError) -> str:
    """The first field that a model refuses, and why, in one short line without its value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    reason = (
        "no field of a sample" if first["type"] == "extra_forbidden" else first["msg"][:1].lower() + first["msg"][1:]
    )
    return f"{ascii(place)[1:-1]:.{_SHOWN}}: {reason}"


def checked(sample: Sample) -> Sample:
    """The sample itself. Raises `NotASampleError` for values that no tokenizer, file name or JSON file can hold.

    A sample whose modality has an image must have one, so that a lost image is noticed.
    """
    for name in _TEXTS:
        if _is_broken(getattr(sample, name)):
            raise NotASampleError(f"{name}: {NOT_UTF8}")
    for path in sample.images:
        if fault := file_name_fault(path):
            raise NotASampleError(f"images: {fault}")
    if sample.meta and not _is_json(sample.meta):
        raise NotASampleError("meta: holds what JSON cannot")
    if sample.modality != "text" and not sample.images:
        raise NotASampleError(f"modality: '{sample.modality}', but there is no image")
    return sample


def marks_fault(text: str, images: int) -> str | None:
    """Why a text that begins with marks of media is refused: a video or sound is not read, or an image is missing."""
    counts = leading_marks(text)
    for medium in ("video", "audio"):
        if counts[medium]:
            return f"a <{medium}> mark: only texts and images are read"
    if counts["image"] > images:
        return "more <image> marks than images"
    return None


def _is_broken(text: str | None) -> bool:
    if not text or text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_json(meta: Mapping[str, Any]) -> bool:
    try:
        json.dumps(meta, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return True
