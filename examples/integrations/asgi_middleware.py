"""A guard around an ASGI application of one's own: here one whose model repeats what it was told.

guardreasoner-vl serve --port 8811
GUARD_URL=http://127.0.0.1:8811 uvicorn --app-dir examples/integrations asgi_middleware:app --port 8900
curl -s 127.0.0.1:8900/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
"""

from __future__ import annotations

import json
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from guardreasoner_vl.integrations import GuardClient
from guardreasoner_vl.integrations.asgi import GuardMiddleware

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.requests import Request


async def chat(request: Request) -> Response:
    """Repeats the last message, at once or word by word."""
    body = await request.json()
    text = str(body["messages"][-1]["content"])
    if body.get("stream"):
        return StreamingResponse(_events(text), media_type="text/event-stream")
    message = {"role": "assistant", "content": text}
    return JSONResponse({"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


def _events(text: str) -> Iterator[str]:
    deltas: list[dict[str, Any]] = [{"content": f"{word} "} for word in text.split()]
    for delta in [*deltas, {}]:
        choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
        yield f"data: {json.dumps({'id': '1', 'choices': [choice]})}\n\n"
    yield "data: [DONE]\n\n"


guard = GuardClient(os.environ.get("GUARD_URL", "http://127.0.0.1:8800"), os.environ.get("GUARD_KEY"))


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """The guard's connections end with the application."""
    async with guard:
        yield


app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])], lifespan=lifespan)
app.add_middleware(GuardMiddleware, guard=guard)
