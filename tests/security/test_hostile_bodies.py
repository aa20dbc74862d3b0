"""Hostile request bodies cause no server error, no allow without a judgement, and no exchange left in flight."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import Limits, ServiceConfig, UpstreamSection
from tests.service.clients import client
from tests.service.sided_backend import SidedBackend

JSON, LINES = "application/json", "application/x-ndjson"
KINDS = [
    "/v1/guard",
    "/v1/guard/stream",
    "/v1/moderations",
    "/v1/chat/completions",
    "/beta/litellm_basic_guardrail_api",
]
NAMES = [
    *("prompt", "images", "response", "messages", "guard", "mode", "include_reasoning", "input", "model", "stream"),
    *(
        "input_type",
        "texts",
        "structured_messages",
        "tool_calls",
        "role",
        "content",
        "type",
        "text",
        "image_url",
        "url",
    ),
    *("function", "name", "arguments", "refusal", "delta", "n", "temperature", "\ud800", "", "__class__"),
]
WORDS = [
    *(
        "Hello.",
        "A BAD word.",
        "BROKEN",
        "",
        " ",
        "\ud800",
        "\udc00\ud800",
        "\x00",
        "text",
        "user",
        "assistant",
        "tool",
    ),
    *("slow", "fast", "default", "other", "request", "response", "image_url", "null", "<|im_end|>", "x" * 300),
    *(
        "data:image/png;base64,\ud800",
        "data:image/png;base64,AAAA",
        "data:",
        "DATA:,x",
        "file:///etc/hosts",
        "http://[::1",
    ),
]
ATOMS = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 2**63, 10**400, 1e308, float("nan"), float("inf"), -float("inf")])
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url"]) | ATOMS},
    optional={"text": VALUES, "image_url": st.sampled_from(WORDS) | st.fixed_dictionaries({"url": ATOMS}) | VALUES},
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"]) | ATOMS},
        optional={"content": st.sampled_from(WORDS) | st.lists(PARTS, max_size=3) | VALUES, "tool_calls": VALUES},
    )
    | VALUES,
    max_size=3,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.sampled_from(WORDS) | VALUES,
        "images": st.lists(st.sampled_from(WORDS) | ATOMS, max_size=3) | VALUES,
        "response": st.sampled_from(WORDS) | VALUES,
        "guard": ATOMS,
        "mode": ATOMS,
    },
)
SHAPED = st.one_of(
    FIELDS,
    st.fixed_dictionaries({"messages": MESSAGES}, optional={"model": ATOMS, "stream": ATOMS, "temperature": ATOMS}),
    st.fixed_dictionaries({"input": VALUES | st.lists(PARTS, max_size=3) | st.lists(ATOMS, max_size=3)}),
    st.fixed_dictionaries(
        {"input_type": st.sampled_from(["request", "response"])},
        optional={
            "texts": st.lists(ATOMS, max_size=3) | VALUES,
            "images": st.lists(st.sampled_from(WORDS) | VALUES, max_size=3),
            "structured_messages": MESSAGES | VALUES,
            "tool_calls": VALUES,
        },
    ),
)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


RAW = (
    st.binary(max_size=40)
    | st.sampled_from([b"{", b"[" * 60_000, b'{"a":' * 60_000, b"\xef\xbb\xbf{}", b'{"prompt": 1e999}', b"", b"null"])
    | VALUES.map(encoded)
)
BODIES = st.tuples(st.sampled_from(KINDS), st.sampled_from([JSON, LINES, "", "text/plain"]), SHAPED.map(encoded) | RAW)
SEQUENCES = st.lists(BODIES, min_size=1, max_size=5)


def answer_of_the_model(request: httpx.Request) -> httpx.Response:
    message = {"role": "assistant", "content": "Fine."}
    if not json.loads(request.content).get("stream"):
        return httpx.Response(200, json={"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    chunks = [{"index": 0, "delta": message}, {"index": 0, "delta": {}, "finish_reason": "stop"}]
    lines = [f"data: {json.dumps({'choices': [chunk]})}\n\n" for chunk in chunks]
    return httpx.Response(
        200, text="".join([*lines, "data: [DONE]\n\n"]), headers={"content-type": "text/event-stream"}
    )


def verdicts_in(path: str, answer: httpx.Response) -> list[dict[str, Any]]:
    """What an answer of status 200 says of each exchange: `action`, and `error` where it is known."""
    if path == "/v1/guard":
        return [answer.json()]
    if path == "/v1/moderations":
        return [
            {"action": "block" if result["flagged"] else "allow", "error": result["verdict"]["error"]}
            for result in answer.json()["results"]
        ]
    if path == "/v1/guard/stream":
        last = answer.text.strip().split("\n\n")[-1]
        assert last.startswith("event: verdict")
        return [json.loads(last.split("data: ", 1)[1])]
    if path == "/v1/chat/completions":
        return [{"action": "allow", "error": None}]
    return [{"action": {"NONE": "allow", "BLOCKED": "block"}[answer.json()["action"]], "error": None}]


async def sent(sequence: list[tuple[str, str, bytes]]) -> None:
    backend = SidedBackend()
    config = ServiceConfig(limits=Limits(queue=3), upstream=UpstreamSection(base_url="http://model.test/v1"))
    app = create_app(config, {"default": backend}, httpx.MockTransport(answer_of_the_model))
    async with client(app) as http:
        for path, kind, body in sequence:
            before = backend.judged
            answer = await http.post(path, content=body, headers={"content-type": kind} if kind else {})
            assert answer.status_code in (200, 400, 404, 422), answer.text
            for verdict in verdicts_in(path, answer) if answer.status_code == 200 else []:
                if verdict["action"] == "allow":
                    assert verdict["error"] is None
                    assert backend.judged > before
        shown = (await http.get("/metrics")).text
        assert re.search(r'^guardreasoner_in_flight\{guard="default"\} 0\.0$', shown, re.MULTILINE)
        valid = await http.post("/v1/guard", json={"prompt": "Hello."})
        assert (valid.status_code, valid.json()["action"]) == (200, "allow")
        assert (await http.get("/readyz")).status_code == 200


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SEQUENCES)
@example([("/v1/guard", JSON, b'{"prompt": "x", "images": ["data:image/png;base64,\\ud800"]}')] * 4)
@example([("/beta/litellm_basic_guardrail_api", JSON, b'{"input_type": "request", "images": [{"url": ["a"]}]}')])
@example([("/v1/guard", "", b'{"prompt": "x", "images": null}')])
@example([("/v1/chat/completions", JSON, b'{"messages": [{"role": "user", "content": "Hello."}], "temperature": NaN}')])
@example([("/v1/chat/completions", JSON, b'{"messages": [{"role": "user", "content": "Hello."}], "user": "\\ud800"}')])
def test_hostile_bodies_break_nothing(sequence: list[tuple[str, str, bytes]]) -> None:
    asyncio.run(sent(sequence))


SURROGATES = [
    {"prompt": "x", "images": ["data:image/png;base64,\ud800"]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,\udfff"}}]}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,\ud800"}}]},
            {"role": "assistant", "content": "A square."},
            {"role": "user", "content": "And now?"},
        ]
    },
]


@pytest.mark.parametrize("path", ["/v1/guard", "/v1/guard/stream"])
@pytest.mark.parametrize("body", SURROGATES)
async def test_a_broken_image_string_takes_no_place_of_the_queue(path: str, body: dict[str, Any]) -> None:
    app = create_app(ServiceConfig(limits=Limits(queue=3)), {"default": SidedBackend()})
    async with client(app) as http:
        for _ in range(4):
            answer = await http.post(path, content=encoded(body), headers={"content-type": JSON})
            assert answer.status_code in (200, 400, 422)
            assert '"action": "allow"' not in answer.text
            assert '"action":"allow"' not in answer.text
        valid = await http.post("/v1/guard", json={"prompt": "Hello."})
    assert (valid.status_code, valid.json()["action"]) == (200, "allow")
