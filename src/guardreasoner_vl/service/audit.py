"""The audit log: one JSON line for each verdict, appended to a file that is rotated.

A line is one write to a file opened for appending, so it is complete in the file when `record` returns, even after
`kill -9`. Only a line whose `record` never returned can be torn (a kill during a long write, a full disk, a power cut);
the next start or line ends it with a newline, so that it damages no other line. Texts and image hashes are written only
if the operator asks for them.

A line that cannot be written does not delay the request: it is logged as CRITICAL with the request's id and counted in
`failed`, and the next line is tried again. One process at a time holds the file, by a lock that ends with the process.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import logging
import os
import stat
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.protocol import INSTRUCTION
from guardreasoner_vl.storage.atomic import sync_folder
from guardreasoner_vl.storage.jsonl_log import is_torn
from guardreasoner_vl.storage.lock import stands_at, try_lock
from guardreasoner_vl.types import CheckedImage, Frozen
from guardreasoner_vl.types.media import is_data_url
from guardreasoner_vl.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.service.callers import Origin
    from guardreasoner_vl.types import Exchange, ImageSource, Target, Turn, Verdict

PROMPT_VERSION = hashlib.sha256(INSTRUCTION.encode()).hexdigest()[:12]
"""Identifies the instruction in the guard's prompt."""

_log = logging.getLogger(__name__)
_SHOWN = {"request", "response", "flagged", "action", "mode", "model", "usage"}
_NEWLINE = b"\n"


class AuditSettings(Frozen):
    """Where the audit log is written, and what it holds."""

    path: Path | None = Field(
        default=None, description="File to append to, in a folder that the service may write. Null: no audit log."
    )
    content: bool = Field(
        default=False, description="Also write the texts, the reasoning and the images' SHA-256. Off: neither."
    )
    max_bytes: int = Field(
        default=100_000_000, ge=1, description="Size of a file in bytes at which a new one is begun; one line at least."
    )
    keep: int = Field(default=10, ge=1, description="Older files to keep, `PATH.1` the newest.")
    sync: bool = Field(
        default=False, description="Wait for the disk at each line, so that a power cut loses none; slower."
    )


class AuditLog:
    """Appends verdicts to `settings.path`; safe for threads. Raises `InputError` if the file cannot be opened.

    `failed` counts the lines that could not be written; `on_failure` is called for each of them.
    """

    def __init__(self, settings: AuditSettings, on_failure: Callable[[], object] = lambda: None) -> None:
        self.failed = 0
        self._settings, self._on_failure = settings, on_failure
        self._path = settings.path and settings.path.absolute()
        self._lock = threading.Lock()
        self._file: int | None = None
        if self._path is not None:
            try:
                self._current_file(self._path)
            except (OSError, ValueError) as error:
                remedy = "give a file that no other process writes, in a folder that this user may write"
                raise InputError(
                    f"{self._path}: the audit log cannot be opened ({_write_failure(error)}); {remedy}"
                ) from error

    def record(
        self,
        verdict: Verdict,
        *,
        digest: str,
        origin: Origin,
        target: Target,
        exchange: Exchange | None,
        cached: bool = False,
    ) -> None:
        """Append one line; `digest` identifies the exchange. A failure is logged and counted, not raised."""
        if self._path is None:
            return
        row = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": origin.request_id,
            "traceparent": origin.traceparent,
            "caller": origin.caller,
            "digest": digest,
            "target": target,
            "cached": cached,
            **verdict.model_dump(mode="json", include=_SHOWN),
            "error": verdict.error and verdict.error.code,
            "version": __version__,
            "prompt_version": PROMPT_VERSION,
        }
        try:
            if self._settings.content:
                row |= {"reasoning": verdict.reasoning, "exchange": exchange and _audited_content(exchange)}
            line = json.dumps(row, allow_nan=False).encode("ascii") + _NEWLINE  # ASCII escapes all line breaks
            with self._lock:
                self._append(self._path, line)
        except (OSError, ValueError) as error:
            with self._lock:
                self.failed += 1
            fields = {"request_id": origin.request_id, "code": "audit"}
            _log.critical(
                "an audit line is lost (%s): free disk space or repair the file", _write_failure(error), extra=fields
            )
            self._on_failure()

    def close(self) -> None:
        """Close the file; a later `record` reopens it."""
        with self._lock:
            self._close_file()

    def _append(self, path: Path, line: bytes) -> None:
        file = self._current_file(path)
        size = os.fstat(file).st_size
        if size and size + len(line) > self._settings.max_bytes:
            file = self._rotated(path, file)
        if os.write(file, line) < len(line):
            raise OSError(errno.ENOSPC, "the line was written only in part")
        if self._settings.sync:
            os.fsync(file)

    def _current_file(self, path: Path) -> int:
        """The open file at `path`, reopened if it was moved or deleted since the last line."""
        if self._file is not None and not stands_at(path, self._file):
            self._close_file()
        if self._file is None:
            self._file = _open_log_file(path, self._settings.sync)
        if is_torn(self._file):
            os.write(self._file, _NEWLINE)
        return self._file

    def _rotated(self, path: Path, file: int) -> int:
        """Rotate and open a new file; if that fails, keep the full one, since a line matters more than the limit."""
        try:
            _shift(path, self._settings.keep)
            self._file = _open_log_file(path, self._settings.sync)
        except OSError as error:
            _log.critical("the audit log cannot be rotated (%s): check its folder", _write_failure(error))
            return file
        os.close(file)
        return self._file

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _audited_content(exchange: Exchange) -> dict[str, Any]:
    return {**_turn(exchange), "history": [_turn(turn) for turn in exchange.history]}


def _turn(turn: Turn) -> dict[str, Any]:
    return {"prompt": turn.prompt, "response": turn.response, "images": [_bytes_digest(image) for image in turn.images]}


def _bytes_digest(source: ImageSource) -> str | None:
    """SHA-256 of the image's file, or of a `data:` URL's text if it is not base64; None if it is neither."""
    if isinstance(source, CheckedImage):
        return source.digest
    if isinstance(source, str) and is_data_url(source):
        head, _, payload = source.partition(",")
        source = source.encode()
        if head.rstrip().lower().endswith(";base64"):
            with suppress(ValueError):
                source = base64.b64decode(payload, validate=True)
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else None


def _open_log_file(path: Path, sync: bool) -> int:
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if not try_lock(file):
            raise BlockingIOError
        if not os.access(path.parent, os.W_OK):
            raise OSError(errno.EACCES, "its folder is not writable, so the log could not be rotated")
        if sync:
            sync_folder(path.parent)
    except BaseException:
        os.close(file)
        raise
    return file


def _shift(path: Path, keep: int) -> None:
    """Rename `path` -> `path.1` -> `path.2` and so on, up to the first gap, which a kill during a shift may leave."""

    def older(number: int) -> Path:
        return Path(f"{path}.{number}")

    last = next((number for number in range(1, keep) if not older(number).exists()), keep)
    for number in range(last - 1, 0, -1):
        older(number).replace(older(number + 1))
    path.replace(older(1))
    surplus = keep + 1  # left over from a larger `keep`
    while older(surplus).exists():
        older(surplus).unlink()
        surplus += 1


def _write_failure(error: Exception) -> str:
    if isinstance(error, BlockingIOError):
        return "another process writes to it"
    return getattr(error, "strerror", None) or type(error).__name__
