"""Files of OpenAI's Batch API: JSON lines of requests to upload, and of results to download.

request  {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}
result   {"custom_id": ..., "response": {"status_code": 200, "body": {...}}, "error": null}
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ValidationError

from guardreasoner_vl.engines.openai.http import HttpError
from guardreasoner_vl.errors import GuardError
from guardreasoner_vl.storage.atomic import replacing
from guardreasoner_vl.teachers.openai import read_teacher_answer

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from guardreasoner_vl.teachers.base import TeacherAnswer

MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000
"""The API's limits for one file."""

_URL = "/v1/chat/completions"
_CODE = re.compile(r"[a-z0-9_]{1,40}")


@dataclass(frozen=True)
class Result:
    """The result of one request: an answer or an error."""

    custom_id: str
    outcome: TeacherAnswer | GuardError


class _Response(BaseModel):
    status_code: int
    body: dict[str, Any] | None = None


class _Error(BaseModel):
    code: str | None = None


class _Line(BaseModel):
    custom_id: str
    response: _Response | None = None
    error: _Error | None = None


def request_line(custom_id: str, body: dict[str, Any]) -> bytes:
    """One request as a line of ASCII JSON."""
    content = {"custom_id": custom_id, "method": "POST", "url": _URL, "body": body}
    return json.dumps(content).encode("ascii") + b"\n"


def read_result(line: bytes) -> Result | None:
    """Parse one result; None if the line is not one."""
    try:
        read = _Line.model_validate_json(line)
    except ValidationError:
        return None
    return Result(read.custom_id, _line_outcome(read))


def _line_outcome(read: _Line) -> TeacherAnswer | GuardError:
    response = read.response
    if response is None:
        code = (read.error and read.error.code) or "no_response"
        return HttpError(
            "the batch result has no response for this request", code if _CODE.fullmatch(code) else "no_response"
        )
    if response.status_code != 200:
        status = response.status_code
        return HttpError(f"the batch result has HTTP status {status} for this request", status=status)
    try:
        return read_teacher_answer(json.dumps(response.body).encode())
    except GuardError as error:
        return error


class RequestFiles:
    """Writes requests to `target`, then to `NAME-2`, `NAME-3` beside it when a file reaches the API's limits.

    A context manager; files are complete at its end or, after an error, do not exist.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._files = ExitStack()
        self.paths: list[Path] = []
        self.requests = 0

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def add(self, line: bytes) -> None:
        """Append one request."""
        if self._lines == MOST_REQUESTS or (self._lines and self._bytes + len(line) > MOST_BYTES):
            self._begin()
        self._stream.write(line)
        self._lines += 1
        self._bytes += len(line)
        self.requests += 1

    def _begin(self) -> None:
        number = len(self.paths) + 1
        name = self._target.name if number == 1 else f"{self._target.stem}-{number}{self._target.suffix}"
        self.paths.append(self._target.with_name(name))
        partial = self._files.enter_context(replacing(self.paths[-1]))
        self._stream = self._files.enter_context(partial.open("wb"))
        self._lines = self._bytes = 0
