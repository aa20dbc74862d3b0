"""Run the service: uvicorn, JSON logs, and a shutdown that answers every accepted request.

    SIGTERM -> not ready, still serving, for `limits.leave_seconds` -> the listener closes -> accepted requests are
    answered -> the engines end

SIGINT, or a second SIGTERM, closes the listener at once. SIGHUP rereads the keys.
"""

from __future__ import annotations

import errno
import gc
import logging
import signal
import socket
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import uvicorn

from guardreasoner_vl.errors import EngineError, InputError
from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.http import bounded
from guardreasoner_vl.service.logs import configure

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from fastapi import FastAPI

    from guardreasoner_vl.service.config import ServiceConfig

_log = logging.getLogger(__name__)
_ACCEPTED_AT_ONCE = 16
"""Connections accepted in one iteration of the event loop: asyncio accepts up to `backlog`."""
_WAITING_CONNECTIONS = 2_048
"""Connections that the kernel queues until they are accepted."""


def serve(config: ServiceConfig, reload: Callable[[], ServiceConfig] | None = None) -> None:
    """Serve until a signal stops the service. Raises `GuardError` if it cannot start.

    `reload` rereads the configuration at SIGHUP; without it SIGHUP has no effect.
    """
    configure(config.log_level)
    with ExitStack() as stack:
        sockets = [stack.enter_context(listening) for listening in bound_sockets(config.host, config.port)]
        app = create_app(config)
        server = _Server(app, config, " and ".join(map(_address, sockets)))
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, lambda *_: reload_keys(app, reload))
        try:
            server.run(sockets=sockets)
        except SystemExit:  # uvicorn exits if the start fails
            pass
        except OSError as error:  # another process took the address while the model was loading
            raise _cannot_listen(config.host, config.port, error) from error
    if app.state.failure:
        raise app.state.failure


class _Server(uvicorn.Server):
    """A uvicorn server whose `/readyz` answers 503 for `leave_seconds` after SIGTERM, before the listener closes."""

    def __init__(self, app: FastAPI, config: ServiceConfig, address: str) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=config.limits.drain_seconds,
                timeout_keep_alive=30,
                lifespan="on",
                ws="none",
                http=bounded(config.limits.body_seconds),
                backlog=_ACCEPTED_AT_ONCE,
            )
        )
        self._app, self._settings, self._address = app, config, address
        self._closes_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_WAITING_CONNECTIONS)
        gc.collect()
        gc.freeze()  # loaded objects stay: each collection would look through them for 50 ms
        if self.started:
            announce(self._address, self._settings)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and self._closes_at is None:
            self._app.state.leaving = True
            self._closes_at = time.monotonic() + self._settings.limits.leave_seconds
            self._captured_signals.append(sig)
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._closes_at is not None and time.monotonic() >= self._closes_at:
            self.should_exit = True
        return await super().on_tick(counter)


def bound_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to the host's addresses, not listening yet. Raises `EngineError`."""
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                sockets.append(_listening(family, kind, protocol, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error  # this machine may not support the family of one of the addresses
                continue
            port = sockets[0].getsockname()[1]
        if missing and not sockets:
            raise missing
    except (OSError, UnicodeError) as error:
        for listening in sockets:
            listening.close()
        raise _cannot_listen(host, port, error) from error
    return sockets


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> EngineError:
    reason = getattr(error, "strerror", None) or "no such address"
    return EngineError(f"cannot listen on {host}, port {port} ({reason}): choose another address or port")


def _listening(family: int, kind: int, protocol: int, address: tuple[Any, ...]) -> socket.socket:
    listening = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":  # on Windows the option would take the address from another process
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
    except OSError:
        listening.close()
        raise
    return listening


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announce(address: str, config: ServiceConfig) -> None:
    """Write one line with address and guards: plain text on a terminal, else a log record."""
    guards = ", ".join(f"{name}: {guard.model} ({guard.mode})" for name, guard in config.guards.items())
    line = f"serving on {address}; guards: {guards}"
    if sys.stderr.isatty():
        sys.stderr.write(line + "\n")
    else:
        _log.info("%s", line)


def reload_keys(app: FastAPI, reload: Callable[[], ServiceConfig] | None) -> None:
    """Reread the keys of the configuration; the old keys stay if it cannot be read."""
    if reload is None:
        _log.error("SIGHUP has no effect: this service was started without a configuration to reread")
        return
    try:
        config: Any = reload()
    except InputError as error:
        _log.critical("the configuration cannot be reread; the old keys stay (%s)", str(error))
        return
    if app.state.callers.needs_key and not config.keys:  # possibly a file that is being written at this moment
        _log.critical("the configuration has no keys now; the old keys stay: restart to serve without keys")
        return
    app.state.callers.reload(config)
    app.state.metrics.callers = app.state.callers.names
    _log.info("the keys were reread; other settings need a restart")
