"""Parse and validate JSON bodies; an error names the wrong field.

JSON is read strictly. The content type is ignored, a byte order mark is skipped, and a null field counts as absent.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError, model_validator

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.recipe.unknown import first_problem

_LONGEST = 200
"""Maximum characters of an error message, since it may contain a field name that the caller chose."""


class InvalidBodyError(InputError):
    """A malformed body: status 422."""

    code = "invalid_request"

    def __init__(self, message: str) -> None:
        super().__init__(message[:_LONGEST])


class Body(BaseModel):
    """A JSON object; a field that is null counts as absent."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: field for name, field in value.items() if field is not None}
        return value


BodyT = TypeVar("BodyT", bound=Body)


def read_json(raw: bytes) -> Any:
    """Parse a body. Raises `InvalidBodyError`, also for NaN, Infinity and numbers out of range, such as 1e999."""
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=_no_number, parse_float=_finite_float)
    except (ValueError, RecursionError):
        raise InvalidBodyError("the body is not JSON: send one JSON object in UTF-8, its numbers finite") from None


def read_body(kind: type[BodyT], raw: bytes) -> BodyT:
    """Parse and validate a body. Raises `InvalidBodyError`."""
    return validated_body(kind, read_json(raw))


def validated_body(kind: type[BodyT], content: Any) -> BodyT:
    """Validate parsed JSON. Raises `InvalidBodyError`."""
    if not isinstance(content, dict):
        raise InvalidBodyError("the body is not a JSON object: send {...}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InvalidBodyError(first_problem(error.errors(), kind, "the body")) from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
