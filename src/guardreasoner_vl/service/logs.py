"""The service's log: one JSON line for each record, which never quotes what was judged.

Messages of this package are logged as written. Other libraries put data into theirs (a URL, a prompt, the `repr` of a
failed task): only their records from WARNING up are logged, with the first line of the message and only those of its
arguments that are numbers. Of an exception the type and the stack are logged; its text, which may quote the input, and
unknown `extra` fields are dropped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import InputError

if TYPE_CHECKING:
    from typing import TextIO

EXTRA = (
    "request_id",
    "traceparent",
    "caller",
    "route",
    "method",
    "status",
    "seconds",
    "guard",
    "target",
    "outcome",
    "code",
)
"""The `extra` fields that are logged."""

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_PACKAGE = "guardreasoner_vl"
_FIXED_BESIDE_EXCEPTIONS = (_PACKAGE, "uvicorn")  # other libraries also put the exception's text into the message
_MOST_FRAMES = 50
_MOST_ERRORS = 8
_log = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """One line of ASCII JSON, so that no record can break the line or send control codes to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object with the known fields of the record; see the module's docstring for what is left out."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _formatted_message(record),
        }
        entry |= {name: _loggable(record.__dict__[name]) for name in EXTRA if name in record.__dict__}
        if record.exc_info and record.exc_info[1]:
            entry["exceptions"] = _exceptions(record.exc_info[1])
        return json.dumps(entry)


class _Handler(logging.StreamHandler["TextIO"]):
    """Drops a record that cannot be written; `logging` would print its arguments instead."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


def configure(level: str = "INFO", stream: TextIO | None = None) -> None:
    """Log as JSON to `stream` (standard error): this package and uvicorn from `level` up, and failures of threads.

    Start uvicorn with `log_config=None`. Its access log is off, since it contains query strings. Raises `InputError`
    for an unknown level.
    """
    if level.upper() not in LEVELS:
        raise InputError(f"this log level is not known: use one of {', '.join(LEVELS)}")
    own_level = getattr(logging, level.upper())
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(own_level, logging.WARNING))
    logging.getLogger(_PACKAGE).setLevel(own_level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(own_level)
        logger.propagate = name != "uvicorn.access"
    threading.excepthook = _thread_failed


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is not None and not isinstance(failure.exc_value, SystemExit):
        _log.critical("a thread failed", exc_info=failure.exc_value)


def _formatted_message(record: logging.LogRecord) -> str:
    """The formatted message. Never raises, because `logging` would then print the arguments."""
    family = record.name.partition(".")[0]
    text = record.msg if isinstance(record.msg, str) else _error_name(record.msg)
    if family != _PACKAGE:
        text = text.partition("\n")[0]  # the rest is a traceback, or data of asyncio
    if record.exc_info and family not in _FIXED_BESIDE_EXCEPTIONS:
        text = ""
    filled = _exceptions_named if family == _PACKAGE else _numbers_only
    arguments = record.args
    try:
        if isinstance(arguments, dict):
            return text % {name: filled(value) for name, value in arguments.items()}
        return text % tuple(map(filled, arguments)) if arguments else text
    except (TypeError, ValueError, KeyError):
        return text


def _exceptions_named(value: object) -> object:
    return _error_name(value) if isinstance(value, BaseException) else value


def _error_name(value: object) -> str:
    """The type's name, and for an `OSError` the system's text for its number."""
    number = value.errno if isinstance(value, OSError) else None
    return type(value).__name__ + (f" ({os.strerror(number)})" if isinstance(number, int) else "")


def _numbers_only(value: object) -> object:
    return value if value is None or isinstance(value, (int, float)) else f"<{type(value).__name__}>"


def _loggable(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float)) else type(value).__name__


def _exceptions(error: BaseException) -> list[dict[str, Any]]:
    """The exception, then its causes and the members of groups, breadth first."""
    visited: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending and len(visited) < _MOST_ERRORS:
        current = pending.pop(0)
        if current is None or any(current is other for other in visited):
            continue
        visited.append(current)
        pending.append(current.__cause__ or (None if current.__suppress_context__ else current.__context__))
        pending.extend(current.exceptions if isinstance(current, BaseExceptionGroup) else ())
    return [{"type": type(exception).__qualname__, "frames": _stack_frames(exception)} for exception in visited]


def _stack_frames(error: BaseException) -> list[str]:
    places = [f"{frame.f_code.co_filename}:{line}" for frame, line in traceback.walk_tb(error.__traceback__)]
    return places[-_MOST_FRAMES:]
