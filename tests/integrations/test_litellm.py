"""The guardrail in the real LiteLLM library, whose models are mocked, and through the hooks that its proxy calls."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.integrations.examples import FOLDER, example
from tests.integrations.service import CLOSED, EXCHANGES, KEY, RED, Running, image_part

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
HELLO = {"messages": [{"role": "user", "content": "Hello."}], "proxy_server_request": {}}


@pytest.fixture
async def guardrail(service: Running) -> AsyncIterator[Any]:
    made = EXAMPLE["guarded"](service.url, KEY, window=40)
    async with made.client:
        yield made
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
    told = await EXAMPLE["ask"](content, answer)
    assert told.startswith("(refused)") if blocked else told == answer


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
        ({"input": [{"role": "user", "content": "Hello."}]}, "unknown_call"),
        ({"prompt": [1, 2, 3]}, "unknown_call"),
        ({"messages": []}, "could not judge"),
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
        (lambda: {"content": [{"type": "text", "text": "Fine."}]}, "unknown_call"),
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
    answer, told = "Fine words. " * 10 + ending, ""
    stream = await litellm.acompletion(model="gpt-4o", messages=HELLO["messages"], mock_response=answer, stream=True)
    if ending == "fine.":
        async for piece in held(guardrail, stream):
            told += piece
        assert told == answer
        return
    with refused("harmful: request, response" if ending == "BAD" else "could not judge"):
        async for piece in held(guardrail, stream):
            told += piece
    assert 0 < len(told) <= 120
    assert answer.startswith(told)


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


async def test_a_stream_of_texts_is_held_back_and_one_of_bytes_refused(guardrail: Any) -> None:
    async def of(chunk: Any) -> AsyncIterator[Any]:
        yield chunk

    for chunk, reason in ((texts(text="BAD"), "harmful"), (b"event: message_start", "unknown_call")):
        with refused(reason):
            assert [piece async for piece in held(guardrail, of(chunk))] == []


# The configuration of the proxy


def test_the_configuration_names_the_class_and_what_it_takes() -> None:
    config = yaml.safe_load((FOLDER / "litellm_config.yaml").read_text())["guardrails"][0]
    params = LitellmParams(**config["litellm_params"]).model_dump(exclude_none=True)
    module, _, name = params.pop("guardrail").rpartition(".")
    assert (module, name) == (GuardReasonerGuardrail.__module__, GuardReasonerGuardrail.__name__)
    # How LiteLLM's registry makes a guardrail of it.
    mode, default_on = params.pop("mode"), params.pop("default_on")
    made = GuardReasonerGuardrail(guardrail_name="g", event_hook=mode, default_on=default_on, **params)
    hooks = (GuardrailEventHooks.pre_call, GuardrailEventHooks.during_call, GuardrailEventHooks.post_call)
    assert [made.should_run_guardrail({}, hook) for hook in hooks] == [True, False, True]
    assert "async_post_call_streaming_iterator_hook" in vars(GuardReasonerGuardrail)
    made.client.close()


def test_the_example(service: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GUARD_URL", service.url)
    monkeypatch.setenv("GUARD_KEY", KEY)
    asyncio.run(EXAMPLE["main"]())
    litellm.callbacks = []
    assert capsys.readouterr().out.count("->  I would gladly tell you.") == 2
