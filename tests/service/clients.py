"""The service in this process, and a client of it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx

from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import ServiceConfig
from tests.service.scripted_backend import ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

KEY = "a-key-of-some-length"


def app_of(backend: ScriptedBackend | None = None, **settings: Any) -> FastAPI:
    return create_app(ServiceConfig(**settings), {"default": backend or ScriptedBackend()})


@asynccontextmanager
async def client(app: FastAPI, key: str | None = None, host: str = "localhost") -> AsyncIterator[httpx.AsyncClient]:
    """Starts the application; an error that it raises is status 500."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=f"http://{host}", headers=headers) as http,
    ):
        yield http
