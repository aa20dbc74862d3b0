"""Checks that every reader applies to a sample, whatever the file format, and the reasons for refusing a row.

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
    """The checked sample with these fields. Raises `NotASampleError`, which names the first invalid field."""
    try:
        sample = Sample.model_validate(fields)
    except ValidationError as error:
        raise NotASampleError(field_fault(error)) from error
    return checked_sample(sample)


def field_fault(error: ValidationError) -> str:
    """One short line: the first invalid field and why, without its value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    reason = (
        "not a field of a sample" if first["type"] == "extra_forbidden" else first["msg"][:1].lower() + first["msg"][1:]
    )
    return f"{ascii(place)[1:-1]:.{_SHOWN}}: {reason}"


def checked_sample(sample: Sample) -> Sample:
    """The sample itself. Raises `NotASampleError` for values that a tokenizer, a file name or JSON cannot hold.

    A sample of an image modality must have an image, so that a lost image is noticed.
    """
    for name in _TEXTS:
        if _is_broken(getattr(sample, name)):
            raise NotASampleError(f"{name}: {NOT_UTF8}")
    for path in sample.images:
        if fault := file_name_fault(path):
            raise NotASampleError(f"images: {fault}")
    if sample.meta and not _is_json_object(sample.meta):
        raise NotASampleError("meta: not representable as JSON")
    if sample.modality != "text" and not sample.images:
        raise NotASampleError(f"modality: '{sample.modality}', but there is no image")
    return sample


def marks_fault(text: str, images: int) -> str | None:
    """Why the media marks at the start of a text are refused: a video or audio mark, or more marks than images."""
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


def _is_json_object(meta: Mapping[str, Any]) -> bool:
    try:
        json.dumps(meta, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return True
