"""Running the service: uvicorn, JSON logs, and an end that loses nothing that was accepted.

On SIGTERM the listener closes, requests under way are answered, then the engines end.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import uvicorn

from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.logs import configure

if TYPE_CHECKING:
    from guardreasoner_vl.service.config import ServiceConfig


def serve(config: ServiceConfig) -> None:
    """Serve until told to stop. Raises `GuardError` if the service cannot start."""
    configure(config.log_level)
    app = create_app(config)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=config.limits.drain_seconds,
            timeout_keep_alive=30,
            lifespan="on",
            ws="none",
        )
    )
    with suppress(SystemExit):  # uvicorn ends the process where a start fails
        server.run()
    if app.state.failure:
        raise app.state.failure
    if not server.started:
        raise EngineError(f"cannot listen on {config.host}, port {config.port}: choose another")
