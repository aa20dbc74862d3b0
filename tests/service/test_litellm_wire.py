"""LiteLLM's generic guardrail API: all content is judged, in whatever field it is, or refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import ServiceConfig
from guardreasoner_vl.service.parts import answer_parts, texts_of
from guardreasoner_vl.service.wire import data_url
from tests.made_images import image
from tests.service.clients import client
from tests.service.sided_backend import SidedBackend

if TYPE_CHECKING:
    import httpx

PATH = "/beta/litellm_basic_guardrail_api"
HELLO = {"role": "user", "content": "Hello."}
FINE = {"role": "assistant", "content": "Fine."}
URL = data_url(image(56, 56).png)


def call(arguments: Any = "{}", name: Any = "look", kind: str = "function") -> dict[str, Any]:
    return {"id": "c1", "type": kind, kind: {"name": name, "input" if kind == "custom" else "arguments": arguments}}


async def asked(*bodies: dict[str, Any], **settings: Any) -> list[httpx.Response]:
    app = create_app(ServiceConfig(**settings), {"default": SidedBackend()})
    async with client(app) as http:
        return [await http.post(PATH, json=body) for body in bodies]


async def action(body: dict[str, Any], **settings: Any) -> str:
    (answer,) = await asked(body, **settings)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["action"])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"texts": ["Hello."]}, "NONE"),
        ({"texts": ["Hello.", "BAD"]}, "BLOCKED"),
        ({"texts": ["Hello."], "structured_messages": [HELLO]}, "NONE"),
        ({"texts": ["BAD"], "structured_messages": [HELLO]}, "BLOCKED"),
        ({"texts": [], "structured_messages": [{"role": "user", "content": "BAD"}]}, "BLOCKED"),
        ({"texts": ["BAD"], "structured_messages": [HELLO, FINE]}, "BLOCKED"),
        ({"texts": ["Fine."], "structured_messages": [{"role": "user", "content": "BAD"}, FINE]}, "BLOCKED"),
        ({"texts": ["BAD"], "structured_messages": [{"role": "assistant", "content": "Fine."}]}, "BLOCKED"),
        ({"tool_calls": [call("BAD")]}, "BLOCKED"),
        ({"tool_calls": [call()], "structured_messages": [HELLO]}, "NONE"),
        ({"tool_calls": [call("BAD")], "structured_messages": [HELLO]}, "BLOCKED"),
        ({"tool_calls": [call("BAD", kind="custom")], "structured_messages": [HELLO]}, "BLOCKED"),
        ({"texts": [], "images": [URL]}, "NONE"),
        ({"images": ["https://example.org/a.png"], "structured_messages": [HELLO]}, "BLOCKED"),
        ({"images": ["https://example.org/a.png"], "structured_messages": [HELLO, FINE]}, "BLOCKED"),
        # The operator's words stand in `texts` as well, and are not judged there either.
        (
            {
                "texts": ["Never say BAD.", "Hello."],
                "structured_messages": [{"role": "system", "content": "Never say BAD."}, HELLO],
            },
            "NONE",
        ),
        # What an earlier turn said is context, wherever else it is listed.
        (
            {
                "texts": ["BAD", "Fine.", "Hello."],
                "structured_messages": [{"role": "user", "content": "BAD"}, FINE, HELLO],
            },
            "NONE",
        ),
        ({}, "BLOCKED"),
        ({"texts": [], "images": [], "tool_calls": [], "structured_messages": []}, "BLOCKED"),
        ({"texts": ["", " "]}, "BLOCKED"),
        ({"structured_messages": [{"role": "system", "content": "Be kind."}]}, "BLOCKED"),
    ],
)
async def test_a_request_is_judged_in_every_field(body: dict[str, Any], expected: str) -> None:
    assert await action({"input_type": "request", **body}) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"texts": ["Fine."]}, "NONE"),
        ({"texts": ["BAD"]}, "BLOCKED"),
        ({"texts": ["BAD"], "structured_messages": [HELLO]}, "BLOCKED"),
        ({"texts": ["BAD"], "structured_messages": [HELLO, FINE]}, "BLOCKED"),
        ({"texts": ["Fine."], "structured_messages": [HELLO, FINE]}, "NONE"),
        ({"texts": [], "tool_calls": [call("BAD")]}, "BLOCKED"),
        ({"texts": [], "tool_calls": [call(name="BAD")], "structured_messages": [HELLO]}, "BLOCKED"),
        ({"texts": ["Fine."], "tool_calls": [call({"what": "BAD"})], "structured_messages": [HELLO]}, "BLOCKED"),
        ({"texts": ["Fine."], "tool_calls": [call()]}, "NONE"),
        ({"texts": ["Fine."], "tool_calls": [call(name=None)]}, "NONE"),
        ({"texts": ["Fine."], "tool_calls": [call("BAD", name=None)]}, "BLOCKED"),
        ({"texts": ["Fine."], "tool_calls": [{"type": "function"}]}, "BLOCKED"),
        ({"texts": ["Fine."], "structured_messages": [HELLO, {**FINE, "tool_calls": [call("BAD")]}]}, "BLOCKED"),
        ({"images": ["https://example.org/a.png"], "structured_messages": [HELLO]}, "BLOCKED"),
        ({"images": [URL], "structured_messages": [HELLO]}, "NONE"),
        ({}, "BLOCKED"),
        ({"structured_messages": [HELLO]}, "BLOCKED"),
        ({"texts": [], "tool_calls": [], "structured_messages": [HELLO]}, "BLOCKED"),
    ],
)
async def test_an_answer_is_judged_in_every_field(body: dict[str, Any], expected: str) -> None:
    assert await action({"input_type": "response", **body}) == expected


async def test_the_reason_names_the_side() -> None:
    (answer,) = await asked({"input_type": "response", "texts": ["BAD"], "structured_messages": [HELLO]})
    assert answer.json()["blocked_reason"] == "the guard finds harmful: response"


async def test_an_answer_that_repeats_its_question_is_judged_as_an_answer() -> None:
    body = {"texts": ["BAD"], "structured_messages": [{"role": "user", "content": "BAD"}]}
    monitored = {"request": {"mode": "monitor"}}
    assert await action({"input_type": "response", **body}, **monitored) == "BLOCKED"
    assert await action({"input_type": "request", **body}, **monitored) == "NONE"


async def test_an_answer_that_cannot_be_judged_counts_for_the_response_alone() -> None:
    body = {"input_type": "response", "texts": ["BROKEN"], "structured_messages": [HELLO]}
    assert await action(body, response={"mode": "monitor"}) == "NONE"
    assert await action(body, request={"mode": "monitor"}) == "BLOCKED"


@pytest.mark.parametrize("images", [None, [], [URL]])
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": ["a"]}},
        {"type": "image_url", "image_url": {"url": {"a": 1}}},
        {"type": "image_url", "image_url": ["a"]},
        {"type": "image_url", "image_url": {}},
        {"type": "image_url", "image_url": 7},
    ],
)
async def test_an_address_that_is_no_string_is_refused(part: dict[str, Any], images: list[str] | None) -> None:
    for input_type in ("request", "response"):
        body = {"input_type": input_type, "structured_messages": [{"role": "user", "content": [part]}]}
        (answer,) = await asked({**body, "images": images})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")


@pytest.mark.parametrize(
    "body",
    [
        {"images": [{"url": ["a"]}]},
        {"tool_calls": [7]},
        {"tool_calls": {"a": 1}},
        {"texts": [["a"]]},
        {"structured_messages": ["a"]},
    ],
)
async def test_other_shapes_are_refused(body: dict[str, Any]) -> None:
    (answer,) = await asked({"input_type": "request", **body})
    assert answer.status_code == 422


@pytest.mark.parametrize(
    "content",
    [
        *({"a": "BAD"}, ["BAD"], [["BAD"]], [{"type": "thinking", "thinking": "BAD"}], [{"type": "new", "x": ["BAD"]}]),
        *([{"type": "input_audio", "input_audio": {}}], [{"type": "file", "file": {"file_id": "f1"}}]),
        *([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}],),
        json.loads("[" * 70 + '"Fine."' + "]" * 70),
    ],
)
@pytest.mark.parametrize("input_type", ["request", "response"])
async def test_content_of_any_form_is_judged_or_blocked(content: Any, input_type: str) -> None:
    said = {"role": "user" if input_type == "request" else "assistant", "content": content}
    body = {"texts": ["Fine."], "images": [URL], "structured_messages": [HELLO, said]}
    assert await action({"input_type": input_type, **body}) == "BLOCKED"


@pytest.mark.parametrize(
    "field",
    [
        *(
            {"reasoning_content": "BAD"},
            {"reasoning": "BAD"},
            {"thinking": "BAD"},
            {"refusal": "BAD"},
            {"function_call": {"name": "BAD"}},
        ),
        *(
            {"thinking_blocks": [{"type": "thinking", "thinking": "BAD", "signature": "s" * 80}]},
            {"audio": {"id": "a"}},
        ),
        *({"provider_specific_fields": {"citations": [{"title": "BAD"}]}}, {"tool_calls": "BAD"}, {"name": "BAD"}),
    ],
)
async def test_every_field_of_an_assistants_message_is_judged_or_blocked(field: dict[str, Any]) -> None:
    body = {"structured_messages": [HELLO, {**FINE, **field}]}
    assert await action({"input_type": "request", **body}) == "BLOCKED"
    assert await action({"input_type": "response", **body}) == "BLOCKED"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_judged_as_text(field: str) -> None:
    parts = answer_parts({"role": "assistant", "content": "Fine.", field: 'It says "yes".'})
    assert texts_of(parts) == ['It says "yes".', "Fine."]
