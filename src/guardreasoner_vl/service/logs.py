"""The service's own log: one line of JSON for each record, which quotes nobody.

A message is shown as this package wrote it. Other libraries put what they work on into theirs (a URL, a prompt, the
`repr` of a task that failed). So they are heard from WARNING on, by the first line of what they say, and of what they
fill into it by numbers alone. An exception is its type and the places it passed; its own text may quote the input and
is dropped, and so are all `extra` fields but the known ones.
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

EXTRA = ("request_id", "traceparent", "caller", "route", "method", "status", "seconds", "guard", "outcome", "code")
"""The `extra` fields that are shown."""

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_OURS = "guardreasoner_vl"
_FIXED_BESIDE_EXCEPTIONS = (_OURS, "uvicorn")  # others tend to put the exception into the text too
_MOST_FRAMES = 50
_MOST_ERRORS = 8
_log = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """One line of ASCII JSON, so that nothing in a record ends the line or steers a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        shown: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        shown |= {name: _plain(record.__dict__[name]) for name in EXTRA if name in record.__dict__}
        if record.exc_info and record.exc_info[1]:
            shown["exceptions"] = _exceptions(record.exc_info[1])
        return json.dumps(shown)


class _Handler(logging.StreamHandler["TextIO"]):
    """A line that cannot be written is lost: the library would print the record's arguments instead."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


def configure(level: str = "INFO", stream: TextIO | None = None) -> None:
    """Log as JSON to `stream` (standard error): this package and uvicorn from `level` on, and the end of threads.

    uvicorn has to be started with `log_config=None`; its access log is off, since it shows query strings. Raises
    `InputError` for an unknown level.
    """
    if level.upper() not in LEVELS:
        raise InputError(f"this log level is not known: use one of {', '.join(LEVELS)}")
    own = getattr(logging, level.upper())
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(own, logging.WARNING))
    logging.getLogger(_OURS).setLevel(own)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(own)
        logger.propagate = name != "uvicorn.access"
    threading.excepthook = _thread_ended


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
        _log.critical("a thread ended by a fault", exc_info=ended.exc_value)


def _message(record: logging.LogRecord) -> str:
    """The text, filled in; never raises, as the library would then print the arguments on the terminal."""
    family = record.name.partition(".")[0]
    text = record.msg if isinstance(record.msg, str) else _named(record.msg)
    if family != _OURS:
        text = text.partition("\n")[0]  # what follows is a traceback, or what asyncio worked on
    if record.exc_info and family not in _FIXED_BESIDE_EXCEPTIONS:
        text = ""
    filled = _exceptions_named if family == _OURS else _numbers_only
    given = record.args
    try:
        if isinstance(given, dict):
            return text % {name: filled(value) for name, value in given.items()}
        return text % tuple(map(filled, given)) if given else text
    except (TypeError, ValueError, KeyError):
        return text


def _exceptions_named(value: object) -> object:
    return _named(value) if isinstance(value, BaseException) else value


def _named(value: object) -> str:
    """The type, and of a system error the system's own words for its number."""
    number = value.errno if isinstance(value, OSError) else None
    return type(value).__name__ + (f" ({os.strerror(number)})" if isinstance(number, int) else "")


def _numbers_only(value: object) -> object:
    return value if value is None or isinstance(value, (int, float)) else f"<{type(value).__name__}>"


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float)) else type(value).__name__


def _exceptions(error: BaseException) -> list[dict[str, Any]]:
    """The exception first, then what it came from and what a group holds."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting and len(found) < _MOST_ERRORS:
        one = waiting.pop(0)
        if one is None or any(one is known for known in found):
            continue
        found.append(one)
        waiting.append(one.__cause__ or (None if one.__suppress_context__ else one.__context__))
        waiting.extend(one.exceptions if isinstance(one, BaseExceptionGroup) else ())
    return [{"type": type(one).__qualname__, "frames": _frames(one)} for one in found]


def _frames(error: BaseException) -> list[str]:
    places = [f"{frame.f_code.co_filename}:{line}" for frame, line in traceback.walk_tb(error.__traceback__)]
    return places[-_MOST_FRAMES:]
