"""The guardrail in the real LiteLLM library, whose models are mocked, and through the hooks that its proxy calls."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.integrations.examples import FOLDER, example
from tests.integrations.litellm_proxy import message_events
from tests.integrations.service import CLOSED, EXCHANGES, KEY, RED, Running, image_part, running_service
from tests.service.enforcement_table import ENFORCE, USES, settings_of
from tests.service.sided_backend import SidedBackend

pytest.importorskip("litellm", reason="litellm is not installed")

import litellm
from litellm.exceptions import GuardrailRaisedException
from litellm.types.guardrails import GuardrailEventHooks, LitellmParams

from guardreasoner_vl.integrations.litellm import GuardReasonerGuardrail

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

# pydantic says so about types of LiteLLM's when it first meets them
pytestmark = pytest.mark.filterwarnings("ignore:Items? '.*using the `ReadOnly` qualifier:UserWarning")
EXAMPLE = example("litellm_guardrail.py")
LONG = "Fine words. " * 20 + "The last words."
HELLO = {"messages": [{"role": "user", "content": "Hello."}], "proxy_server_request": {}}


@pytest.fixture
async def guardrail(service: Running) -> AsyncIterator[Any]:
    guardrail_under_test = EXAMPLE["guarded"](service.url, KEY, window=40)
    async with guardrail_under_test.client:
        yield guardrail_under_test
    litellm.callbacks = []


async def before(guardrail: Any, data: dict[str, Any], hook: str = "async_pre_call_hook") -> None:
    cache = {"cache": None} if hook == "async_pre_call_hook" else {}
    await getattr(guardrail, hook)(user_api_key_dict=None, data=data, call_type="acompletion", **cache)


async def after(guardrail: Any, response: Any, data: dict[str, Any] = HELLO) -> None:
    await guardrail.async_post_call_success_hook(data=data, user_api_key_dict=None, response=response)


def refused(reason: str) -> Any:
    return pytest.raises(GuardrailRaisedException, match=reason)


# The library


@pytest.mark.parametrize(
    ("content", "answer", "blocked"),
    [
        *EXCHANGES,
        ([{"type": "input_audio", "input_audio": {}}], "Gladly.", True),
    ],
)
async def test_a_call_is_judged_at_both_ends(guardrail: Any, content: Any, answer: str, blocked: bool) -> None:
    reply = await EXAMPLE["ask"](content, answer)
    assert reply.startswith("(refused)") if blocked else reply == answer


@pytest.mark.parametrize(("request_use", "response_use"), USES)
async def test_what_is_enforced_is_blocked_and_what_is_monitored_passes(request_use: str, response_use: str) -> None:
    cases = [("A BAD request.", "Fine.", request_use), ("Hello.", "A BAD answer.", response_use)]
    with running_service(SidedBackend(), **settings_of(request_use, response_use)) as sided:
        async with EXAMPLE["guarded"](sided.url, KEY).client:
            for said, answer, use in cases:
                assert (await EXAMPLE["ask"](said, answer)).startswith("(refused)") == (use == ENFORCE)
    litellm.callbacks = []


async def test_without_a_service_everything_is_blocked() -> None:
    async with EXAMPLE["guarded"](CLOSED, None).client:
        assert await EXAMPLE["ask"]("Hello.") == "(refused) the guard could not judge (guard_unreachable)"
    litellm.callbacks = []


async def test_the_library_refuses_to_stream_what_it_cannot_hold_back(guardrail: Any) -> None:
    call = {"model": "gpt-4o", "messages": HELLO["messages"], "mock_response": "BAD", "guardrails": ["guardreasoner"]}
    with refused("unheld_stream"):
        await litellm.acompletion(**call, stream=True)


async def test_an_unnamed_messages_argument_is_not_seen_and_not_let_through(guardrail: Any) -> None:
    with refused("unknown_call"):
        await litellm.acompletion("gpt-4o", HELLO["messages"], mock_response="Fine.", guardrails=["guardreasoner"])


# The hooks that the proxy calls


@pytest.mark.parametrize("hook", ["async_pre_call_hook", "async_moderation_hook"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"messages": [{"role": "user", "content": [image_part(RED)]}]}, "harmful: request"),
        ({"prompt": "BAD"}, "harmful: request"),
        ({"prompt": ["Hello.", "BAD"]}, "harmful: request"),
        ({"input": "BAD"}, "harmful: request"),
        ({"input": [{"role": "user", "content": "BAD"}]}, "harmful: request"),
        ({"messages": [{"role": "user", "content": "Hello."}], "prompt": "BAD"}, "harmful: request"),
        ({"messages": [{"role": "user", "content": "Hello."}], "input": ["BAD"]}, "harmful: request"),
        ({"prompt": "Hello.", "suffix": "BAD"}, "harmful: request"),
        ({"prompt": {"id": "p1", "variables": {"what": "BAD"}}}, "harmful: request"),
        ({"messages": [{"role": "user", "content": "Hello."}], "prediction": {"content": "BAD"}}, "harmful: request"),
        ({"messages": [{"role": "user", "content": "Hello."}], "extra_body": {"messages": ["BAD"]}}, "harmful"),
        ({"prompt": [1, 2, 3]}, "unreadable"),
        ({"messages": []}, "unknown_call"),
        ({"file": b""}, "unknown_call"),
        ({}, "unknown_call"),
    ],
)
async def test_requests_of_all_kinds(guardrail: Any, data: dict[str, Any], reason: str, hook: str) -> None:
    with refused(reason) as raised:
        await before(guardrail, data, hook)
    assert (raised.value.status_code, raised.value.blocked_content) == (400, "harmful" in reason)
    await before(guardrail, {"prompt": "Hello."}, hook)


def completion(**message: Any) -> Any:
    return litellm.ModelResponse(choices=[{"message": {"role": "assistant", "content": None, **message}}])


CALL = {"id": "c1", "type": "function", "function": {"name": "bake", "arguments": '{"what": "BAD"}'}}


def texts(**choice: Any) -> Any:
    return litellm.TextCompletionResponse(choices=[{"index": 0, "finish_reason": "stop", **choice}])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: completion(content="BAD"), "harmful"),
        (lambda: completion(content="Fine.", reasoning_content="BAD"), "harmful"),
        (lambda: completion(tool_calls=[CALL]), "harmful"),
        (lambda: completion(content="Fine.", images=[{**image_part(RED), "index": 0}]), "harmful"),
        (lambda: texts(text="BAD"), "harmful"),
        (lambda: texts(message={"role": "assistant", "content": "Fine."}), "unknown_call"),
        (lambda: litellm.ImageResponse(data=[]), "unknown_call"),
        (lambda: {"content": [{"type": "text", "text": "BAD"}]}, "harmful"),
        (lambda: {"data": [{"text": "Fine."}]}, "unknown_call"),
        (lambda: completion(content="Fine.", annotations=[{"type": "url_citation", "title": "BAD"}]), "harmful"),
        (lambda: completion(content="Fine.", thinking_blocks=[{"type": "thinking", "thinking": "BAD"}]), "harmful"),
        (lambda: completion(content="Fine.", provider_specific_fields={"citations": ["BAD"]}), "harmful"),
        (
            lambda: completion(
                content="Fine.", audio={"id": "a", "data": "AA", "transcript": "Fine.", "expires_at": 1}
            ),
            "unreadable",
        ),
    ],
)
async def test_answers_of_all_kinds(guardrail: Any, answer: Callable[[], Any], reason: str) -> None:
    with refused(reason):
        await after(guardrail, answer())


async def test_harmless_answers_pass(guardrail: Any) -> None:
    await after(guardrail, completion(content="Gladly."))
    await after(guardrail, litellm.EmbeddingResponse(), {"input": "Hello."})


async def held(guardrail: Any, stream: Any) -> AsyncIterator[str]:
    hook = guardrail.async_post_call_streaming_iterator_hook
    async for chunk in hook(user_api_key_dict=None, response=stream, request_data=HELLO):
        for choice in chunk.choices:
            yield getattr(choice, "text", None) or choice.delta.content or ""


@pytest.mark.parametrize("ending", ["fine.", "BAD", "BROKEN"])
async def test_a_stream_is_held_back(guardrail: Any, ending: str) -> None:
    answer, reply = "Fine words. " * 10 + ending, ""
    stream = await litellm.acompletion(model="gpt-4o", messages=HELLO["messages"], mock_response=answer, stream=True)
    if ending == "fine.":
        async for piece in held(guardrail, stream):
            reply += piece
        assert reply == answer
        return
    with refused("harmful: request, response" if ending == "BAD" else "could not judge"):
        async for piece in held(guardrail, stream):
            reply += piece
    assert 0 < len(reply) <= 120
    assert answer.startswith(reply)


async def test_a_refused_stream_is_not_read_on(guardrail: Any) -> None:
    read = 0

    async def endless() -> AsyncIterator[Any]:
        nonlocal read
        while True:
            read += 1
            yield texts(text="BAD words.")

    with refused("harmful"):
        assert [piece async for piece in held(guardrail, endless())] == []
    assert read == 4


async def test_a_stream_of_texts_is_held_back_and_one_of_no_known_kind_refused(guardrail: Any) -> None:
    async def of(chunk: Any) -> AsyncIterator[Any]:
        yield chunk

    for chunk, reason in (
        (texts(text="BAD"), "harmful"),
        (7, "unknown_call"),
        ({"text": "Fine."}, "unreadable"),
        (b"data: Fine.\n\n", "unreadable"),
    ):
        with refused(reason):
            assert [piece async for piece in held(guardrail, of(chunk))] == []


@pytest.mark.parametrize("call_type", ["aimage_generation", "atranscription", "aimage_edit", "agenerate_content"])
async def test_calls_that_may_hold_files_are_refused_whatever_else_they_hold(guardrail: Any, call_type: str) -> None:
    with refused("unknown_call"):
        await guardrail.async_pre_call_hook(None, None, {"prompt": "Hello.", "file": b"x"}, call_type)


# What LiteLLM's translations of routes hand over


@pytest.mark.parametrize(
    ("inputs", "input_type", "reason"),
    [
        ({"texts": ["BAD"]}, "request", "request"),
        ({"texts": ["BAD"], "structured_messages": HELLO["messages"]}, "request", "request"),
        ({"texts": [], "images": [RED]}, "request", "request"),
        ({"texts": ["BAD"]}, "response", "response"),
        ({"texts": [], "tool_calls": [{"function": {"name": "look", "arguments": "BAD"}}]}, "response", "response"),
        ({"texts": ["BROKEN"]}, "response", "could not judge"),
        ({"texts": []}, "request", "could not judge"),
        ({"texts": []}, "response", "could not judge"),
    ],
)
async def test_apply_guardrail_judges_all_that_it_is_given(
    guardrail: Any, inputs: dict[str, Any], input_type: str, reason: str
) -> None:
    for data in ({}, HELLO):
        with refused(reason):
            await guardrail.apply_guardrail(inputs=inputs, request_data=data, input_type=input_type)
    fine = {"texts": ["Fine."], "images": [], "model": "m"}
    assert await guardrail.apply_guardrail(inputs=fine, request_data=HELLO, input_type=input_type) == fine


@pytest.mark.parametrize(
    "fields",
    [
        [{"reasoning_content": "B"}, {"reasoning_content": "AD"}],
        [{"thinking_blocks": [{"thinking": "B"}]}, {"thinking_blocks": [{"thinking": "AD"}]}],
        [{"tool_calls": [{"index": 0, "function": {"name": "look", "arguments": '{"x": "BAD"}'}}]}],
        [{"content": "Fine.", "provider_specific_fields": {"citation": {"title": "BAD"}}}],
        [{"content": "Fine.", "images": [{"type": "image_url", "image_url": {"url": RED}}]}],
        [{"content": "Fine."}, {"annotations": [{"title": "BAD"}]}],
    ],
)
async def test_every_field_of_a_delta_is_judged(guardrail: Any, fields: list[dict[str, Any]]) -> None:
    async def stream() -> AsyncIterator[Any]:
        for field in fields:
            yield litellm.ModelResponseStream(choices=[{"index": 0, "delta": field}])

    with refused("harmful"):
        assert [piece async for piece in held(guardrail, stream())] == []


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
async def test_events_that_come_cut_anywhere_are_held_back(guardrail: Any, size: int) -> None:
    def sent(text: str) -> bytes:
        events = message_events([{"type": "text", "text": text}])
        return "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()

    async def cut(whole: bytes) -> AsyncIterator[bytes]:
        for at in range(0, len(whole), size):
            yield whole[at : at + size]

    hook = guardrail.async_post_call_streaming_iterator_hook
    passed = [piece async for piece in hook(user_api_key_dict=None, response=cut(sent(LONG)), request_data=HELLO)]
    assert b"".join(passed) == sent(LONG)
    released = b""
    with refused("harmful"):
        async for piece in hook(user_api_key_dict=None, response=cut(sent(LONG + " BAD")), request_data=HELLO):
            released += piece
    assert sent(LONG + " BAD").startswith(released)
    assert b"BAD" not in released
    assert bool(released) == (size < 100)


# The configuration of the proxy


def test_the_configuration_names_the_class_and_what_it_takes() -> None:
    config = yaml.safe_load((FOLDER / "litellm_config.yaml").read_text())["guardrails"][0]
    params = LitellmParams(**config["litellm_params"]).model_dump(exclude_none=True)
    module, _, name = params.pop("guardrail").rpartition(".")
    assert (module, name) == (GuardReasonerGuardrail.__module__, GuardReasonerGuardrail.__name__)
    # How LiteLLM's registry makes a guardrail of it.
    mode, default_on = params.pop("mode"), params.pop("default_on")
    guardrail_under_test = GuardReasonerGuardrail(guardrail_name="g", event_hook=mode, default_on=default_on, **params)
    hooks = (GuardrailEventHooks.pre_call, GuardrailEventHooks.during_call, GuardrailEventHooks.post_call)
    assert [guardrail_under_test.should_run_guardrail({}, hook) for hook in hooks] == [True, False, True]
    assert "async_post_call_streaming_iterator_hook" in vars(GuardReasonerGuardrail)
    guardrail_under_test.client.close()


def test_the_example(service: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GUARD_URL", service.url)
    monkeypatch.setenv("GUARD_KEY", KEY)
    asyncio.run(EXAMPLE["main"]())
    litellm.callbacks = []
    assert capsys.readouterr().out.count("->  I would gladly tell you.") == 2
