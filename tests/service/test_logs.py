"""The JSON log: one line for each record, and never content of a caller, whichever library logs."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import socket
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.errors import GuardError
from guardreasoner_vl.service.logs import EXTRA, JsonFormatter, configure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import Receive, Scope, Send

CANARY = "canary-of-the-caller"
OURS = logging.getLogger("guardreasoner_vl.service.tested")
THEIRS = logging.getLogger("some_library.part")
NAMES = ("", "guardreasoner_vl", "uvicorn", "uvicorn.error", "uvicorn.access")


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """A configured log; the process's logging settings are restored afterwards."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    stream = io.StringIO()
    configure("DEBUG", stream)
    yield stream
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def rows(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def fail(text: str = CANARY) -> None:
    raise ValueError(f"cannot read {text}")


# One line


def test_a_record_is_one_line_with_the_known_fields(stream: io.StringIO) -> None:
    extra = dict.fromkeys(EXTRA, "x") | {"status": 200, "seconds": 0.25, "prompt": CANARY, "taskName": CANARY}
    OURS.warning("answered %s in %d", "it", 3, extra=extra)
    (row,) = rows(stream)
    assert row.pop("time").endswith("+00:00")
    assert row == {
        "level": "WARNING",
        "logger": OURS.name,
        "message": "answered it in 3",
        **dict.fromkeys(EXTRA, "x"),
        "status": 200,
        "seconds": 0.25,
    }


@given(st.text(), st.text())
def test_nothing_ends_the_line_or_steers_a_terminal(text: str, request_id: str) -> None:
    hostile = f"{text}\r\n\x1b[2J\x7f\x85\u2028\ud800"
    record = logging.LogRecord(OURS.name, logging.INFO, "x.py", 1, "%s", (hostile,), None)
    record.__dict__["request_id"] = request_id + "\n\x7f"
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["message"] == hostile
    assert json.loads(line)["request_id"] == request_id + "\n\x7f"


@pytest.mark.parametrize(
    ("given_value", "shown"),
    [(float("nan"), "nan"), (None, None), (True, True), ({"a": CANARY}, "dict"), (ValueError(CANARY), "ValueError")],
)
def test_fields_are_plain_values(stream: io.StringIO, given_value: object, shown: object) -> None:
    OURS.info("request", extra={"code": given_value})
    assert rows(stream)[0]["code"] == shown


def test_levels(stream: io.StringIO) -> None:
    configure("info", stream)
    OURS.debug("no")
    OURS.info("yes")
    THEIRS.info("no")
    THEIRS.warning("yes")
    logging.getLogger("uvicorn.error").info("yes")
    assert [row["message"] for row in rows(stream)] == ["yes"] * 3


def test_configuring_twice_does_not_double_the_lines(stream: io.StringIO) -> None:
    configure("DEBUG", stream)
    OURS.info("once")
    assert len(rows(stream)) == 1


def test_an_unknown_level_is_one_clear_error() -> None:
    with pytest.raises(GuardError, match="use one of DEBUG"):
        configure("LOUD")


# Exceptions


def test_an_exception_is_its_type_and_places(stream: io.StringIO) -> None:
    try:
        fail()
    except ValueError as error:
        OURS.exception("it failed: %s", error)
    (row,) = rows(stream)
    assert row["message"] == "it failed: ValueError"
    (shown,) = row["exceptions"]
    line = fail.__code__.co_firstlineno + 1
    assert shown["type"] == "ValueError"
    assert shown["frames"][-1] == f"{__file__}:{line}"
    assert all(frame.rpartition(":")[2].isdigit() for frame in shown["frames"])
    assert CANARY not in stream.getvalue()


def test_causes_and_groups_are_named_and_not_quoted(stream: io.StringIO) -> None:
    try:
        try:
            fail()
        except ValueError as error:
            raise ExceptionGroup(CANARY, [KeyError(CANARY), OSError(CANARY)]) from error
    except ExceptionGroup:
        OURS.exception("it failed")
    (row,) = rows(stream)
    assert [one["type"] for one in row["exceptions"]] == ["ExceptionGroup", "ValueError", "KeyError", "OSError"]
    assert CANARY not in stream.getvalue()


def test_a_deep_or_circular_exception_stays_small(stream: io.StringIO) -> None:
    def deep(depth: int) -> None:
        if not depth:
            fail()
        deep(depth - 1)

    try:
        deep(300)
    except ValueError as error:
        error.__context__ = RuntimeError(CANARY)
        error.__context__.__context__ = error
        OURS.exception("it failed")
    (row,) = rows(stream)
    assert [one["type"] for one in row["exceptions"]] == ["ValueError", "RuntimeError"]
    assert len(row["exceptions"][0]["frames"]) == 50


def test_a_thread_that_ends_by_a_fault_is_logged_without_its_text(
    stream: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    for target in (fail, sys.exit):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    (row,) = rows(stream)
    assert row["level"] == "CRITICAL"
    assert row["exceptions"][0]["type"] == "ValueError"
    assert CANARY not in stream.getvalue() + "".join(capfd.readouterr())


def test_an_exception_as_message_is_its_type(stream: io.StringIO) -> None:
    OURS.error(ValueError(CANARY))
    THEIRS.error(OSError(CANARY, CANARY))
    THEIRS.error(FileNotFoundError(errno.ENOENT, CANARY, CANARY))
    assert [row["message"] for row in rows(stream)] == [
        "ValueError",
        "OSError",
        "FileNotFoundError (No such file or directory)",
    ]


# What other libraries write


def test_others_fill_in_numbers_alone(stream: io.StringIO) -> None:
    THEIRS.warning("%s took %.1f s, %d of %r", CANARY, 0.25, 7, {"text": CANARY})
    THEIRS.warning("%(text)s: %(count)d", {"text": CANARY, "count": 3})
    THEIRS.warning("first\nthen %s", CANARY)
    THEIRS.warning(f"first\n{CANARY}")
    assert [row["message"] for row in rows(stream)] == [
        "<str> took 0.2 s, 7 of '<dict>'",
        "<str>: 3",
        "first",
        "first",
    ]


def test_an_exception_of_a_library_is_logged_without_its_text(stream: io.StringIO) -> None:
    try:
        fail()
    except ValueError as error:
        THEIRS.exception(f"failed: {error}")
    (row,) = rows(stream)
    assert row["message"] == ""
    assert row["exceptions"][0]["type"] == "ValueError"
    assert CANARY not in stream.getvalue()


async def test_a_task_and_a_callback_that_fail_are_not_quoted(stream: io.StringIO) -> None:
    async def failing() -> None:
        fail()

    loop = asyncio.get_running_loop()
    loop.call_soon(fail, CANARY)
    task = asyncio.create_task(failing())
    await asyncio.sleep(0.01)
    del task
    await asyncio.sleep(0.01)
    assert [row["logger"] for row in rows(stream)] == ["asyncio", "asyncio"]
    assert CANARY not in stream.getvalue()


@pytest.mark.parametrize("logger", [OURS, THEIRS])
def test_a_broken_record_or_stream_does_not_print_its_arguments(
    stream: io.StringIO, capfd: pytest.CaptureFixture[str], logger: logging.Logger
) -> None:
    configure("DEBUG", stream)  # takes out the handlers of pytest, which do print them
    logger.error("%d tokens", CANARY)
    logger.error("%s and %s", CANARY)
    logger.error("%(name)s", {"other": CANARY})
    written = stream.getvalue()
    assert [row["message"] for row in rows(stream)] == ["%d tokens", "%s and %s", "%(name)s"]
    stream.close()
    logger.error("%s", CANARY)
    assert CANARY not in written + "".join(capfd.readouterr())


# uvicorn


async def unable(scope: Scope, receive: Receive, send: Send) -> None:
    """Log like Starlette after a failed start: the traceback is passed as text."""
    await receive()
    await send({"type": "lifespan.startup.failed", "message": f"Traceback:\n  somewhere\nValueError: {CANARY}"})


def test_a_start_that_fails_is_not_quoted(stream: io.StringIO) -> None:
    server = uvicorn.Server(uvicorn.Config(unable, log_config=None, lifespan="on", port=0))
    with suppress(SystemExit):  # not in all versions of uvicorn
        server.run()
    assert "Traceback:" in [row["message"] for row in rows(stream)]
    assert CANARY not in stream.getvalue()


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http"
    fail()


def test_uvicorn_writes_through_it_and_its_access_log_is_off(
    stream: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    configure("INFO", stream)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        url = f"http://127.0.0.1:{port}/{CANARY}?text={CANARY}"
        assert httpx.post(url, content=CANARY, headers={"x-note": CANARY}).status_code == 500
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(f"{CANARY}\r\n\r\n".encode())
            client.recv(1000)
        server.should_exit = True
        thread.join()
    messages = [row["message"].strip() for row in rows(stream)]
    assert {row["logger"] for row in rows(stream)} == {"uvicorn.error"}
    assert "Exception in ASGI application" in messages
    assert "Invalid HTTP request received." in messages
    assert any(message.startswith("Started server process [") for message in messages)
    assert CANARY not in stream.getvalue() + "".join(capfd.readouterr())
